// Multi-adapter LoRA, stage 2, for decoding: the long side is divided, and read 16 bytes at a time.
//
// In decoding each row is one token, so each matrix is used once: the time is that of reading them, and what counts
// is how many bytes are under way at once. For "shrink" the warps of a block each take a part of the features, for
// "expand" each takes some of the ranks; every lane has 16 bytes of several rows under way, and the warps' sums meet
// in shared memory. (Chen et al. 2023, Punica, arXiv:2310.18547, section 4, divide likewise.)
// Predicted on a GPU: 64 rows with 64 adapters of rank 16 between 4096 features in bfloat16 are 16.8 MB: 3.9 us at
// 4.3 TB/s, a third of what gathering moves and in two launches. Measured: not yet run on a GPU.
#include <type_traits>

#include "lora_gather.cuh"

namespace {

constexpr int SHRINK_WARPS = 8, SHRINK_THREADS = 32 * SHRINK_WARPS;
constexpr int RANKS = 4;  // of a block: they share what is read of x
constexpr int EXPAND_WARPS = 4, EXPAND_THREADS = 32 * EXPAND_WARPS;
constexpr int COLUMNS = 8 * 32;  // of a block

struct ShrinkParts {
  Shared<float> sum[SHRINK_WARPS][RANKS];
};
struct ExpandParts {
  Shared<float> sum[EXPAND_WARPS][8][33];  // column 8 * lane + i at [i][lane]: either way few lanes meet in a bank
};

template <class X, class F>
__global__ void __launch_bounds__(SHRINK_THREADS) shrink(Shrink s) {
  ShrinkParts& parts = shared<ShrinkParts>();
  int first = blockIdx.x * RANKS, t = blockIdx.y, b = blockIdx.z;
  Adapter adapter = adapter_of(s.thin, b);
  const X* x = row_of<const X>(s.x, b, t);
  const F* a = row_of<const F>(s.a, adapter.number, first);
  float sum[RANKS] = {};
  auto multiply = [&](auto whole) {
    for (int k = 8 * threadIdx.x; k < s.width && first < adapter.rank; k += 8 * SHRINK_THREADS) {
      float values[8], weights[RANKS][8];
      load8<decltype(whole)::value>(values, x + k, s.width - k);
#pragma unroll
      for (int r = 0; r < RANKS; ++r) {  // past the last rank, the last again
        int mine = kept(1131) ? min(r, adapter.rank - 1 - first) : r;
        load8<decltype(whole)::value>(weights[r], a + mine * s.a.rank + k, s.width - k);
      }
#pragma unroll
      for (int r = 0; r < RANKS; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[r] += values[i] * weights[r][i];
      }
    }
  };
  bool whole = rows_are_whole(x, 0, s.width) && rows_are_whole(a, s.a.rank, s.width);
  whole || !kept(1132) ? multiply(std::true_type{}) : multiply(std::false_type{});
#pragma unroll
  for (int r = 0; r < RANKS; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (lane_number() == 0) parts.sum[warp_number()][r] = sum[r];
  }
  if (kept(1133)) __syncthreads();  // the parts of all warps are there
  int r = threadIdx.x;
  if (r >= RANKS || (first + r >= s.thin.R && kept(1134))) return;
  float total = 0;
  for (int warp = 0; warp < SHRINK_WARPS; ++warp) total += parts.sum[warp][r];
  if (first + r >= adapter.rank && kept(1135)) total = 0;
  store(s.u + number_of(s.thin, b, t) * s.thin.R + first + r, total);
}

template <class X, class F>
__global__ void __launch_bounds__(EXPAND_THREADS) expand(Expand x) {
  ExpandParts& parts = shared<ExpandParts>();
  int begin = blockIdx.x * COLUMNS, t = blockIdx.y, b = blockIdx.z, lane = lane_number();
  Adapter adapter = adapter_of(x.thin, b);
  const float* u = x.u + number_of(x.thin, b, t) * x.thin.R;
  int column = begin + 8 * lane;
  const F* matrix = row_of<const F>(x.b, adapter.number, 0);
  float sum[8] = {};
  auto add = [&](auto whole) {
#pragma unroll 4
    for (int r = warp_number(); r < adapter.rank; r += EXPAND_WARPS) {
      float weights[8], mine = load(u + r);
      load8<decltype(whole)::value>(weights, matrix + r * x.b.rank + column, x.width - column);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += mine * weights[i];
    }
  };
  bool whole = rows_are_whole(matrix, x.b.rank, x.width);
  if (column < x.width || !kept(1136)) whole || !kept(1137) ? add(std::true_type{}) : add(std::false_type{});
#pragma unroll
  for (int i = 0; i < 8; ++i) parts.sum[warp_number()][i][lane] = sum[i];
  if (kept(1138)) __syncthreads();  // the parts of all warps are there
  for (int c = threadIdx.x; c < COLUMNS && (begin + c < x.width || !kept(1139)); c += EXPAND_THREADS) {
    float total = 0;
    for (int warp = 0; warp < EXPAND_WARPS; ++warp) total += parts.sum[warp][c % 8][c / 8];
    float before = x.y.data ? load(row_of<const X>(x.y, b, t) + begin + c) : 0;
    store(row_of<X>(x.out, b, t) + begin + c, before + adapter.scale * total);
  }
}

}  // namespace

int lora_shrink_v2(const Shrink& s, void* stream) {
  if (s.a.feature != 1 || s.dropout.p > 0 || s.thin.T > 65535) return INVALID;
  return for_types(s.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(s.thin.R, RANKS), s.thin.T, s.thin.B);
    return launch(shrink<X, F>, grid, SHRINK_THREADS, sizeof(ShrinkParts), stream, s);
  });
}

int lora_expand_v2(const Expand& x, void* stream) {
  if (x.b.feature != 1 || x.dropout.p > 0 || x.thin.T > 65535) return INVALID;
  return for_types(x.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(x.width, COLUMNS), x.thin.T, x.thin.B);
    return launch(expand<X, F>, grid, EXPAND_THREADS, sizeof(ExpandParts), stream, x);
  });
}
