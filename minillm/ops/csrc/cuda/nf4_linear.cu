// A linear layer for few rows, whose weight stays in NF4: what is read is a quarter of bfloat16.
//
// Stage 1: a thread for each output. Neighbouring threads read codes a row apart, and the table lies in global
// memory.
// Stage 2: a warp takes 4 rows of the weight; each lane reads 16 bytes of them, 32 codes, at once, and what it reads
// of x serves all 4. The table of 16 values is in shared memory, where lookups never wait for each other. Memory
// gives a multiprocessor 19 bytes, 37 codes, in each of its cycles, and the table 32 values: so the lookups bound it,
// just.
// Predicted on a GPU, for 4096 x 4096 and one row of x: 2.6 us, 3 times faster than the same in bfloat16. More rows
// than 8 are better served by stage 2 of nf4_dequantize and the library's product. Measured: not yet run on a GPU.
#include "nf4.cuh"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int OUTPUTS = 4;  // of a warp
constexpr int CODES = 32;   // in 16 bytes: a lane's part of a row
constexpr int FEW = 8;      // rows of x

template <class T>
__device__ float bias_of(const Nf4Linear& l, int o) {
  return l.bias ? load(static_cast<const T*>(l.bias) + o) : 0;
}

template <class T>
__global__ void linear_v1(Nf4Linear l) {
  int o = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y;
  if (o >= l.Dout && kept(1231)) return;
  const T* x = static_cast<const T*>(l.x) + m * l.x_row;
  float sum = bias_of<T>(l, o);
  for (int k = 0; k < l.Din; ++k) sum += load(x + k) * weight_of(l.weight, int64_t{o} * l.Din + k);
  store(static_cast<T*>(l.y) + m * l.y_row + o, sum);
}

template <class T, int M>  // M: rows of x that are kept in mind, at least l.M
__global__ void __launch_bounds__(THREADS) linear_v2(Nf4Linear l) {
  Table& table = shared<Table>();
  table.fill(l.weight.book);
  int first = OUTPUTS * (blockIdx.x * WARPS + warp_number()), lane = lane_number();
  if (first >= l.Dout && kept(1232)) return;
  float sum[OUTPUTS][M] = {};
  for (int k = CODES * lane; k < l.Din; k += CODES * 32) {
    uint4 codes[OUTPUTS];
    float scale[OUTPUTS], start[OUTPUTS];
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) {  // past the last output, the last again
      int64_t weight = int64_t{kept(1233) ? min(first + r, l.Dout - 1) : first + r} * l.Din + k;
      codes[r] = load16(l.weight.codes + weight / 2);
      scale[r] = scale_of(l.weight, weight / l.weight.block);
      start[r] = -zero_of(l.weight, weight / l.weight.block) * scale[r];  // the value of code 0, where there are zeros
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float weights[OUTPUTS][8];
#pragma unroll
      for (int r = 0; r < OUTPUTS; ++r) {
        uint32_t words[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[r][i] = table(words[word], i) * scale[r] + start[r];
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m >= l.M && kept(1234)) break;
        float x[8];
        load8(x, static_cast<const T*>(l.x) + m * l.x_row + k + 8 * word, 8);
#pragma unroll
        for (int r = 0; r < OUTPUTS; ++r) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[r][m] += x[i] * weights[r][i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < OUTPUTS; ++r) {
    if (first + r >= l.Dout && kept(1235)) break;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = warp_sum(sum[r][m]);
      if (lane == 0 && (m < l.M || !kept(1236))) {
        store(static_cast<T*>(l.y) + m * l.y_row + first + r, total + bias_of<T>(l, first + r));
      }
    }
  }
}

template <class T>
int linear(const Nf4Linear& l, int stage, void* stream) {
  if (stage == 1) return launch(linear_v1<T>, dim3((l.Dout + THREADS - 1) / THREADS, l.M), THREADS, 0, stream, l);
  auto several = l.M <= 4 ? linear_v2<T, 4> : linear_v2<T, FEW>;
  auto kernel = l.M == 1 ? linear_v2<T, 1> : l.M == 2 ? linear_v2<T, 2> : several;
  dim3 grid(l.M ? (l.Dout + OUTPUTS * WARPS - 1) / (OUTPUTS * WARPS) : 0);
  return launch(kernel, grid, THREADS, sizeof(Table), stream, l);
}

}  // namespace

// Stage 2 wants at most 8 rows of x, and 32 neighbouring codes in 16 bytes to share their scale and row. 0: the latest
// that takes this call.
extern "C" int minillm_nf4_linear(const Nf4Linear* l, int stage, void* stream) {
  if (stage < 0 || stage > 2 || !sound(l->dtype, l->weight.block) || l->M > 65535) return INVALID;
  bool words = l->Din % CODES == 0 && l->weight.block % CODES == 0 && begins_on_16_bytes(l->weight.codes);
  if (stage == 2 && (!words || l->M > FEW)) return INVALID;
  if (stage == 0) stage = words && l->M <= FEW ? 2 : 1;
  return l->dtype == FLOAT32 ? linear<float>(*l, stage, stream) : linear<bfloat16>(*l, stage, stream);
}
