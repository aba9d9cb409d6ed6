// Multi-adapter LoRA, stage 3, for prompts and training: tiles in shared memory.
//
// Here a row of the batch is a text, a segment of T positions with one adapter (what Punica calls SGMV). 32 positions
// share what is read of the matrices, and 32 ranks what is read of x: each is read once from memory and then 32 times
// from shared memory. Short rows of shared memory are one longer than the tile, so that 32 lanes that read a column use
// all 32 banks.
// Predicted on a GPU: bound by the reads of shared memory, 9 for 8 multiplications, and a rank below 32 leaves lanes
// idle: for 8192 positions of 4096 features and rank 16 about 170 us to shrink, where reading x takes 16, and 40 to
// expand. Measured: not yet run on a GPU.
#include "lora_gather_tiles.cuh"

namespace {

struct ExpandTiles {
  Shared<float> u[POSITIONS][RANKS + 1];
};

template <class X, class F>
__global__ void __launch_bounds__(TILE_THREADS) shrink(Shrink s) {
  ShrinkTiles& tile = shared<ShrinkTiles>();
  int begin = blockIdx.x * POSITIONS, first = blockIdx.y * RANKS, b = blockIdx.z;
  int lane = lane_number(), mine = OWN * warp_number();
  Adapter adapter = adapter_of(s.thin, b);
  float sum[OWN] = {};
  int width = first < adapter.rank ? s.width : 0;
  for (int start = 0; start < width; start += FEATURES) {
    if (kept(1141)) __syncthreads();  // all warps are done with the last tile
    load_positions<X>(tile.x, s.thin, s.x, s.dropout, b, begin, start, s.width);
    load_ranks<F>(tile.a, s.a, adapter, first, start, s.width);
    if (kept(1142)) __syncthreads();  // all of this tile is there
    for (int f = 0; f < FEATURES; ++f) {
      float weight = tile.a[lane][f];
#pragma unroll
      for (int i = 0; i < OWN; ++i) sum[i] += tile.x[mine + i][f] * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int t = begin + mine + i;
    if (t >= s.thin.T && kept(1143)) break;
    if (first + lane < s.thin.R || !kept(1144)) store(s.u + number_of(s.thin, b, t) * s.thin.R + first + lane, sum[i]);
  }
}

constexpr int GROUPS = 4;                 // of 32 features: a lane has one of each
constexpr int COLUMNS = 32 * GROUPS;      // of a block

template <class X, class F>
__global__ void __launch_bounds__(TILE_THREADS) expand(Expand x) {
  ExpandTiles& tile = shared<ExpandTiles>();
  int begin = blockIdx.x * POSITIONS, b = blockIdx.z, mine = OWN * warp_number();
  int column = blockIdx.y * COLUMNS + lane_number();
  Adapter adapter = adapter_of(x.thin, b);
  float sum[OWN][GROUPS] = {};
  for (int first = 0; first < adapter.rank; first += RANKS) {
    if (kept(1145)) __syncthreads();  // all warps are done with the last tile
    load_u(tile.u, x.thin, x.u, b, begin, first);
    if (kept(1146)) __syncthreads();  // all of this tile is there
    for (int r = 0; r < min(RANKS, adapter.rank - first); ++r) {
      const F* row = row_of<const F>(x.b, adapter.number, first + r);
      float weight[GROUPS];
#pragma unroll
      for (int c = 0; c < GROUPS; ++c) {
        int o = column + 32 * c;
        weight[c] = o < x.width || !kept(1147) ? load(row + o * x.b.feature) : 0;
      }
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        float u = tile.u[mine + i][r];
#pragma unroll
        for (int c = 0; c < GROUPS; ++c) sum[i][c] += u * weight[c];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int t = begin + mine + i;
    if (t >= x.thin.T && kept(1148)) break;
    uint32_t key = row_key(x.dropout, number_of(x.thin, b, t));
#pragma unroll
    for (int c = 0; c < GROUPS; ++c) {
      int o = column + 32 * c;
      if (o >= x.width && kept(1149)) break;
      float before = x.y.data ? load(row_of<const X>(x.y, b, t) + o) : 0;
      float update = adapter.scale * sum[i][c] * keeping(x.dropout, key, o);
      store(row_of<X>(x.out, b, t) + o, before + update);
    }
  }
}

}  // namespace

int lora_shrink_v3(const Shrink& s, void* stream) {
  return for_types(s.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(s.thin.T, POSITIONS), parts_of(s.thin.R, RANKS), s.thin.B);
    return launch(shrink<X, F>, grid, TILE_THREADS, sizeof(ShrinkTiles), stream, s);
  });
}

int lora_expand_v3(const Expand& x, void* stream) {
  return for_types(x.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(x.thin.T, POSITIONS), parts_of(x.width, COLUMNS), x.thin.B);
    return launch(expand<X, F>, grid, TILE_THREADS, sizeof(ExpandTiles), stream, x);
  });
}
