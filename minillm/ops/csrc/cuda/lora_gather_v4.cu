// Multi-adapter LoRA, stage 4: the tensor cores multiply, and memory is read 16 bytes at a time.
//
// What is left of the time in stage 3 is that of moving numbers through shared memory. Here they go from memory into
// the registers of an mma (lora_gather_mma.cuh says how), so that only reading x, or reading and writing y, is left.
// For "shrink" 8 warps divide the features of 32 positions and add their sums in the end; for "expand" each warp has
// 32 positions and 64 features of its own, and meets nobody.
// Predicted on a GPU: near the speed of memory: for 8192 positions of 4096 features and rank 16, 16 us to shrink and
// 31 to expand in place, where PyTorch's operations take 16 and 94. Measured: not yet run on a GPU.
#include "lora_gather_mma.cuh"

namespace {

constexpr int SHRINK_WARPS = 8, SHRINK_THREADS = 32 * SHRINK_WARPS;
constexpr int EXPAND_WARPS = 4, EXPAND_THREADS = 32 * EXPAND_WARPS;
constexpr int COLUMNS = 64;  // of a warp

// Features k, .. k + 7 of a rank; in a matrix (Dout, R) they lie apart.
__device__ Eight load_rank(const Factor& a, const Adapter& adapter, int r, int k, bool inside) {
  const bfloat16* from = row_of<const bfloat16>(a, adapter.number, r) + k * a.feature;
  if (a.feature == 1 || !inside) return load_eight(from, inside);
  Eight all;
#pragma unroll
  for (int i = 0; i < 4; ++i, from += 2 * a.feature) all.pair[i] = pack(fetch(from), fetch(from + a.feature));
  return all;
}

template <int N>
struct ShrinkParts {
  Shared<float> sum[SHRINK_WARPS][MMA_POSITIONS][8 * N + 1];
};

template <int N>  // tiles of 8 ranks
__global__ void __launch_bounds__(SHRINK_THREADS) shrink(Shrink s) {
  ShrinkParts<N>& parts = shared<ShrinkParts<N>>();
  int begin = blockIdx.x * MMA_POSITIONS, first = blockIdx.y * 8 * N, b = blockIdx.z;
  int g = lane_number() / 4, t = lane_number() % 4;
  Adapter adapter = adapter_of(s.thin, b);
  float sum[2][N][4] = {};
  int width = first < adapter.rank ? s.width : 0;
  for (int start = 32 * warp_number(); start < width; start += 32 * SHRINK_WARPS) {
    int k = start + 8 * t;
    bool inside = k < width || !kept(1171);
    Eight rows[4], ranks[N];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int position = begin + g + 8 * i;
      bool there = inside && (position < s.thin.T || !kept(1172));
      rows[i] = load_eight(row_of<const bfloat16>(s.x, b, position) + k, there);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      int r = first + 8 * n + g;
      ranks[n] = load_rank(s.a, adapter, r, k, inside && (r < adapter.rank || !kept(1173)));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      drop(rows[i], s.dropout, row_key(s.dropout, number_of(s.thin, b, begin + g + 8 * i)), k);
    }
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        auto &upper = rows[2 * m].pair, &lower = rows[2 * m + 1].pair;
        uint32_t x[4] = {upper[half], lower[half], upper[half + 1], lower[half + 1]};
#pragma unroll
        for (int n = 0; n < N; ++n) mma(sum[m][n], x, {ranks[n].pair[half], ranks[n].pair[half + 1]});
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        parts.sum[warp_number()][16 * m + g + e / 2 * 8][8 * n + 2 * t + e % 2] = sum[m][n][e];
      }
    }
  }
  if (kept(1174)) __syncthreads();  // the sums of all warps are there
  for (int e = threadIdx.x; e < MMA_POSITIONS * 8 * N; e += SHRINK_THREADS) {
    int i = e / (8 * N), r = e % (8 * N), position = begin + i;
    if ((position >= s.thin.T && kept(1175)) || (first + r >= s.thin.R && kept(1176))) continue;
    float total = 0;
    for (int warp = 0; warp < SHRINK_WARPS; ++warp) total += parts.sum[warp][i][r];
    store(s.u + number_of(s.thin, b, position) * s.thin.R + first + r, total * kept_scale(s.dropout));
  }
}

// Ranks r, .. r + 3 of 8 outputs from `column` on, as `multiply` wants them.
__device__ void load_outputs(uint32_t (&w)[8][2], const Factor& b, const Adapter& adapter, int r, int column,
                             int width) {
  bool inside = column < width || !kept(1177);
  if (b.feature == 1) {
    Eight rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bfloat16* from = row_of<const bfloat16>(b, adapter.number, r + i) + column;
      rows[i] = load_eight(from, inside && (r + i < adapter.rank || !kept(1178)));
    }
    turn(w, rows);
  } else {  // (Dout, R): the four ranks of an output are 8 bytes
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bfloat16* from = row_of<const bfloat16>(b, adapter.number, r) + (column + j) * b.feature;
      bool there = inside && (r < adapter.rank || !kept(1179));
      uint64_t four = there ? fetch(reinterpret_cast<const uint64_t*>(from)) : 0;
      w[j][0] = static_cast<uint32_t>(four), w[j][1] = static_cast<uint32_t>(four >> 32);
    }
  }
}

__global__ void __launch_bounds__(EXPAND_THREADS) expand(Expand x) {
  int begin = blockIdx.x * MMA_POSITIONS, b = blockIdx.z, g = lane_number() / 4, t = lane_number() % 4;
  int base = (blockIdx.y * EXPAND_WARPS + warp_number()) * COLUMNS;
  Adapter adapter = adapter_of(x.thin, b);
  if (base >= x.width && kept(1182)) return;
  float sum[2][8][4] = {};
  for (int first = 0; first < adapter.rank; first += 16) {
    uint32_t weights[8][2];
    load_outputs(weights, x.b, adapter, first + 4 * t, base + 8 * g, x.width);
    Precise u[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int position = begin + g + 8 * i;
      const float* from = x.u + number_of(x.thin, b, position) * x.thin.R + first + 4 * t;
      float row[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        bool inside = (position < x.thin.T || !kept(1183)) && (first + 4 * t + r < adapter.rank || !kept(1184));
        row[r] = inside ? load(from + r) : 0;
      }
      u[i / 2].set(i % 2, row);
    }
    multiply(sum, u, weights);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int position = begin + g + 8 * i;
    if (position >= x.thin.T && kept(1185)) break;
    uint32_t key = row_key(x.dropout, number_of(x.thin, b, position));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      int column = base + 16 * t + 8 * c;
      if (column >= x.width && kept(1186)) break;
      float values[8] = {};
      if (x.y.data) load8<true>(values, row_of<const bfloat16>(x.y, b, position) + column, 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] += adapter.scale * sum[i / 2][j][i % 2 * 2 + c] * keeping(x.dropout, key, column + j);
      }
      put8(row_of<bfloat16>(x.out, b, position) + column, values);
    }
  }
}

}  // namespace

// bfloat16; features a multiple of 8, in rows that begin on 16 bytes.
int lora_shrink_v4(const Shrink& s, void* stream) {
  bool factor = aligned(s.a) || s.a.rank == 1;
  if (!for_tensor_cores(s.thin, s.width) || !aligned(s.x) || !factor) return INVALID;
  auto run = [&]<int N>() {
    dim3 grid(parts_of(s.thin.T, MMA_POSITIONS), parts_of(s.thin.R, 8 * N), s.thin.B);
    return launch(shrink<N>, grid, SHRINK_THREADS, sizeof(ShrinkParts<N>), stream, s);
  };
  if (s.thin.R <= 8) return run.template operator()<1>();
  if (s.thin.R <= 16) return run.template operator()<2>();
  return run.template operator()<4>();
}

// The same; or of a matrix (Dout, R) the ranks a multiple of 4.
int lora_expand_v4(const Expand& x, void* stream) {
  bool fours = x.thin.R % 4 == 0 && x.b.feature % 4 == 0 && begins_on_16_bytes(x.b.data);
  bool turned = x.b.rank == 1 && fours && !x.thin.ranks;
  bool factor = aligned(x.b) || turned, y = !x.y.data || aligned(x.y);
  if (!for_tensor_cores(x.thin, x.width) || !aligned(x.out) || !y || !factor) return INVALID;
  dim3 grid(parts_of(x.thin.T, MMA_POSITIONS), parts_of(x.width, COLUMNS * EXPAND_WARPS), x.thin.B);
  return launch(expand, grid, EXPAND_THREADS, 0, stream, x);
}
