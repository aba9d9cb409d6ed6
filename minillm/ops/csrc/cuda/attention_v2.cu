// Attention, stage 2: tiles in shared memory, and the softmax computed while the keys go by.
//
// The 16 queries of a block share each key and value: 32 of them are copied to shared memory, used, and replaced. No
// score is computed twice and no row of scores is ever stored (tiles.cuh has both ideas), so the output stays in
// registers.
// Predicted on a GPU: reads a 30th of stage 1's bytes (the emulated GPU counts them); bound by float32 arithmetic.
// Measured: not yet run on a GPU.
#include "tiles.cuh"

namespace {

template <int N>
struct Tiles {
  Shared<float> q[ROWS][32 * N];
  Shared<float> k[COLUMNS][32 * N + 1];  // a lane reads its own row: odd length
  Shared<float> v[COLUMNS][32 * N];
};

template <class T, int N>
__global__ void __launch_bounds__(TILE_THREADS, 4) attention_v2(Attention a) {
  Tiles<N>& tile = shared<Tiles<N>>();
  int h = blockIdx.y, b = blockIdx.z, g = h / (a.H / a.G), lane = lane_number(), mine = OWN * warp_number();
  int begin = blockIdx.x * ROWS, end = end_of(begin, ROWS, a.T);
  load_rows<T>(tile.q, a.q, b, h, begin, a.T, a.K);
  OnlineSoftmax<N> softmax[OWN];

  for (auto keys = next_tile<COLUMNS>(a, b, begin, end, 0, a.S); keys.start < a.S;
       keys = next_tile<COLUMNS>(a, b, begin, end, keys.start + COLUMNS, a.S)) {
    if (kept(201)) __syncthreads();  // all warps are done with the last tile
    load_rows<T>(tile.k, a.k, b, g, keys.start, a.S, a.K);
    load_rows<T>(tile.v, a.v, b, g, keys.start, a.S, a.K);
    if (kept(202)) __syncthreads();  // all of this tile is there

    float dot[OWN] = {}, weight[OWN];
    for (int f = 0; f < a.K; ++f) {
      float key = tile.k[lane][f];
#pragma unroll
      for (int r = 0; r < OWN; ++r) dot[r] += tile.q[mine + r][f] * key;
    }
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
      bool seen = keys.has(lane) && in_sight(a, begin + mine + r, keys.start + lane);
      weight[r] = softmax[r].add(seen ? a.scale * dot[r] : -INFINITY);
    }
    for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        float w = __shfl_sync(WHOLE_WARP, weight[r], j);
        for (int n = 0; n < N; ++n) softmax[r].o[n] += w * tile.v[j][lane + 32 * n];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < OWN; ++r) {
    int i = begin + mine + r;
    if (i >= a.T && kept(203)) break;
    auto& [max, sum, o] = softmax[r];
    bool empty = sum == 0;
    T* to = row_of<T>(a.o, b, h, i);
    for (int n = 0; n < N; ++n) {
      int f = lane + 32 * n;
      if (f < a.K || !kept(204)) store(to + f, empty && kept(205) ? 0 : o[n] / sum);
    }
    if (lane == 0) store(a.lse + (int64_t{b} * a.H + h) * a.T + i, empty ? -INFINITY : max + logf(sum));
  }
}

}  // namespace

extern "C" int minillm_attention_v2(const Attention* a, void* stream) {
  return for_type_and_size(*a, [&]<class T, int N>() {
    return launch(attention_v2<T, N>, grid_of(a->T, ROWS, a->H, a->B), TILE_THREADS, sizeof(Tiles<N>), stream, *a);
  });
}
