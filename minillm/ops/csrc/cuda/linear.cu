// A linear layer for at most 4 rows, as in generation: all of its time goes into reading the weight once.
//
// Stage 1: a warp for each output and each row of x. Its lanes read numbers that lie side by side, so nothing comes
// from memory in vain; but a lane waits for one number at a time, and for each row the weight is read again.
// Stage 2: memory gives its full speed only to those who have asked for much of it before the first bytes arrive: an
// H200, 4.3 TB/s after 0.7 us, for 3 MB, or 23 KB on each of its multiprocessors. So a block takes 4 outputs, and each
// thread asks for 16 bytes of each of them; 1024 blocks of 128 threads are 63 KB on each. All rows of x share what is
// read of the weight, the 4 outputs what is read of x, and the block's threads add up what they found.
// Predicted on a GPU, for 4096 x 4096 in bfloat16: 8 us, the time of reading 34 MB, for 1 row as for 4; stage 1 three
// times that for 1 row. Measured: not yet run on a GPU.
#include "../linear.h"

#include "global.cuh"

namespace {

constexpr int INVALID = 1;  // cudaErrorInvalidValue: this stage does not take this shape
constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int OUTPUTS = 4;  // of a block
constexpr int FEW = 4;      // rows of x

template <class T>
__device__ void finish(const Linear& l, int m, int o, float sum) {
  float bias = l.bias ? load(static_cast<const T*>(l.bias) + o) : 0;
  store(static_cast<T*>(l.y) + m * l.y_row + o, sum + bias);
}

template <class T>
__global__ void linear_v1(Linear l) {
  int o = blockIdx.x * WARPS + warp_number(), m = blockIdx.y;
  if (o >= l.Dout && kept(1301)) return;
  const T* x = static_cast<const T*>(l.x) + m * l.x_row;
  const T* weight = static_cast<const T*>(l.weight) + o * l.weight_row;
  float sum = 0;
  for (int k = lane_number(); k < l.Din; k += 32) sum += load(x + k) * load(weight + k);
  sum = warp_sum(sum);
  if (lane_number() == 0) finish<T>(l, m, o, sum);
}

// Neighbouring numbers as floats: the 16 bytes from here on, or one.
template <class T, int WIDTH>
__device__ void read(float (&to)[WIDTH], const T* from) {
  if constexpr (WIDTH == 1) {
    to[0] = load(from);
  } else {
    unpack(to, fetch(reinterpret_cast<const uint4*>(from)), from);
  }
}

template <int M>
struct Parts {  // what each warp found
  Shared<float> sum[WARPS][OUTPUTS][M];
};

template <class T, int M, int WIDTH>
__global__ void __launch_bounds__(THREADS) linear_v2(Linear l) {
  int first = OUTPUTS * blockIdx.x;
  const T *x = static_cast<const T*>(l.x), *rows[OUTPUTS];
#pragma unroll
  for (int r = 0; r < OUTPUTS; ++r) {  // past the last output, the last again
    int o = kept(1302) ? min(first + r, l.Dout - 1) : first + r;
    rows[r] = static_cast<const T*>(l.weight) + o * l.weight_row;
  }

  float sum[OUTPUTS][M] = {};
  for (int k = WIDTH * threadIdx.x; k < l.Din; k += WIDTH * THREADS) {
    float weights[OUTPUTS][WIDTH];
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) read(weights[r], rows[r] + k);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float numbers[WIDTH];
      read(numbers, x + m * l.x_row + k);
#pragma unroll
      for (int r = 0; r < OUTPUTS; ++r) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[r][m] += numbers[i] * weights[r][i];
      }
    }
  }

  Parts<M>& parts = shared<Parts<M>>();
#pragma unroll
  for (int r = 0; r < OUTPUTS; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = warp_sum(sum[r][m]);
      if (lane_number() == 0) parts.sum[warp_number()][r][m] = total;
    }
  }
  if (kept(1303)) __syncthreads();  // every warp's sums are there
  int r = threadIdx.x / M, m = threadIdx.x % M;
  if ((r >= OUTPUTS && kept(1304)) || (first + r >= l.Dout && kept(1305))) return;
  float total = 0;
  for (int warp = 0; warp < WARPS; ++warp) total += parts.sum[warp][r][m];
  finish<T>(l, m, first + r, total);
}

template <class T, int WIDTH>
auto v2_for(int M) {
  auto several = M == 3 ? linear_v2<T, 3, WIDTH> : linear_v2<T, 4, WIDTH>;
  return M == 1 ? linear_v2<T, 1, WIDTH> : M == 2 ? linear_v2<T, 2, WIDTH> : several;
}

template <class T>
int linear(const Linear& l, int stage, void* stream) {
  if (stage == 1) return launch(linear_v1<T>, dim3((l.Dout + WARPS - 1) / WARPS, l.M), THREADS, 0, stream, l);
  constexpr int WIDE = 16 / sizeof(T);
  bool starts = begins_on_16_bytes(l.x) && begins_on_16_bytes(l.weight);
  bool whole = starts && l.Din % WIDE == 0 && l.weight_row % WIDE == 0 && (l.x_row % WIDE == 0 || l.M == 1);
  auto kernel = whole ? v2_for<T, WIDE>(l.M) : v2_for<T, 1>(l.M);
  size_t room = sizeof(float) * WARPS * OUTPUTS * l.M;
  return launch(kernel, dim3((l.Dout + OUTPUTS - 1) / OUTPUTS), THREADS, room, stream, l);
}

}  // namespace

// Both stages take every shape: rows that do not begin on 16 bytes are read number by number. A low-rank update is
// that of lora_linear.cu.
extern "C" int minillm_linear(const Linear* l, int stage, void* stream) {
  bool known = l->dtype == FLOAT32 || l->dtype == BFLOAT16;
  if (stage < 0 || stage > 2 || !known || l->M < 1 || l->M > FEW || l->R) return INVALID;
  return l->dtype == FLOAT32 ? linear<float>(*l, stage, stream) : linear<bfloat16>(*l, stage, stream);
}
