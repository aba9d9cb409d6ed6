// The gradients of the factors, stage 2: on the tensor cores.
//
// u^T x is the product of stage 4's "expand", with the positions in the place of the ranks: 16 positions of 64 features
// go from memory into registers as they are. A block has 32 ranks and 64 features of one adapter; its four warps take
// turns at the positions, and add their sums in the end, in their order: each run gives the same bits.
// Predicted on a GPU: near the speed of memory where there are enough blocks for it, 64 for each adapter and part with
// 4096 features: with 8 adapters or parts. Measured: not yet run on a GPU.
#include "lora_gather_mma.cuh"
#include "lora_gather_sum.cuh"

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int RANKS = 32, COLUMNS = 64;

struct WarpSums {
  Shared<float> of[WARPS][RANKS][COLUMNS + 1];
};

__global__ void __launch_bounds__(THREADS, 3) sum_positions(Sum s) {
  WarpSums& sums = shared<WarpSums>();
  int base = blockIdx.x * COLUMNS, first = blockIdx.y * RANKS, n = blockIdx.z % s.thin.N, part = blockIdx.z / s.thin.N;
  int g = lane_number() / 4, t = lane_number() % 4, column = base + 8 * g;
  int share = (s.thin.T + s.parts - 1) / s.parts, stop = min((part + 1) * share, s.thin.T);
  float sum[2][8][4] = {};
  for (int b = 0; b < s.thin.B; ++b) {
    if (adapter_of(s.thin, b).number != n || adapter_of(s.thin, b).rank == 0) continue;  // the same for all threads
    for (int begin = part * share + 16 * warp_number(); begin < stop; begin += 16 * WARPS) {
      Eight rows[4];
      float u[4][4];  // ranks g, g + 8, .. of positions 4t, ..
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int position = begin + 4 * t + i;
        bool there = position < stop || !kept(1191), inside = there && (column < s.width || !kept(1192));
        rows[i] = load_eight(row_of<const bfloat16>(s.x, b, position) + column, inside);
        drop(rows[i], s.dropout, row_key(s.dropout, number_of(s.thin, b, position)), column);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          bool rank = first + g + 8 * r < s.thin.R || !kept(1193);
          u[r][i] = there && rank ? load(s.u + number_of(s.thin, b, position) * s.thin.R + first + g + 8 * r) : 0;
        }
      }
      uint32_t x[8][2];
      turn(x, rows);
      Precise precise[2];
#pragma unroll
      for (int r = 0; r < 4; ++r) precise[r / 2].set(r % 2, u[r]);
      multiply(sum, precise, x);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) sums.of[warp_number()][g + 8 * i][16 * t + 8 * c + j] = sum[i / 2][j][i % 2 * 2 + c];
    }
  }
  if (kept(1194)) __syncthreads();  // the sums of all warps are there
  Adapter adapter = describe(s.thin, n);
  for (int e = threadIdx.x; e < RANKS * COLUMNS; e += THREADS) {
    int r = e / COLUMNS, k = e % COLUMNS;
    if ((first + r >= s.thin.R && kept(1195)) || (base + k >= s.width && kept(1196))) continue;
    float total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += sums.of[warp][r][k];
    keep_sum<bfloat16>(s, adapter, part, first + r, base + k, total * kept_scale(s.dropout));
  }
}

}  // namespace

// bfloat16; features a multiple of 8, in rows that begin on 16 bytes.
int lora_sum_v2(const Sum& s, void* stream) {
  if (!sound(s) || !for_tensor_cores(s.thin, s.width) || !aligned(s.x)) return INVALID;
  dim3 grid(parts_of(s.width, COLUMNS), parts_of(s.thin.R, RANKS), s.thin.N * s.parts);
  int error = launch(sum_positions, grid, THREADS, sizeof(WarpSums), stream, s);
  return error ? error : add_parts<bfloat16>(s, stream);
}
