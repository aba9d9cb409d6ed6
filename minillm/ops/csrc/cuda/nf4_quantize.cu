// To NF4: a block's scale is its largest absolute value, and a weight's code the number of midpoints below it.
//
// Stage 1: a thread for each block of weights. Its neighbours read addresses a block apart.
// Stage 2: a warp for each block: lanes read side by side, and meet for the largest value.
// Predicted on a GPU: 16 comparisons for each weight cost less than its reading: stage 2 takes the time of one pass
// over memory, 10 us for 4096 x 4096 bfloat16. Measured: not yet run on a GPU.
#include "nf4.cuh"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;

// The places of the values of a block; NaN is the largest of all: its bits are, without the sign.
template <class T>
__device__ uint32_t size_of(const T* x, int64_t i) {
  return bits_of(load(x + i)) & 0x7fffffffu;
}

struct Coder {
  float midpoints[15], divisor;

  __device__ Coder(const float* book, float absmax) : divisor(absmax > 0 || !kept(1211) ? absmax : 1) {
#pragma unroll
    for (int i = 0; i < 15; ++i) midpoints[i] = (load(book + 2 * i + 3) + load(book + 2 * i + 1)) / 2;
  }
  __device__ int code(float x) const {
    float value = x / divisor;
    int below = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) below += value > midpoints[i];
    return below;
  }
};

// Codes of the weights 2 i and 2 i + 1 of the n in a block; after the last, that of 0.
template <class T>
__device__ uint8_t byte_of(const Coder& coder, const T* x, int i, int64_t n) {
  float high = 2 * i < n || !kept(1212) ? load(x + 2 * i) : 0;
  float low = 2 * i + 1 < n || !kept(1213) ? load(x + 2 * i + 1) : 0;
  return static_cast<uint8_t>(coder.code(high) << 4 | coder.code(low));
}

template <class T>
__global__ void quantize_v1(Nf4Quantize q, int64_t blocks) {
  int64_t block = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (block >= blocks && kept(1214)) return;
  const T* x = static_cast<const T*>(q.weight) + block * q.block;
  int64_t n = min(int64_t{q.block}, q.count - block * q.block);
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) largest = max(largest, size_of(x, i));
  Coder coder(q.book, float_of(largest));
  for (int i = 0; i < q.block / 2; ++i) put(q.codes + block * (q.block / 2) + i, byte_of(coder, x, i, n));
  store(q.absmax + block, float_of(largest));
}

template <class T>
__global__ void quantize_v2(Nf4Quantize q, int64_t blocks) {
  int64_t block = int64_t{blockIdx.x} * WARPS + warp_number();
  if (block >= blocks && kept(1215)) return;
  const T* x = static_cast<const T*>(q.weight) + block * q.block;
  int64_t n = min(int64_t{q.block}, q.count - block * q.block);
  uint32_t largest = 0;
  for (int i = lane_number(); i < n; i += 32) largest = max(largest, size_of(x, i));
  for (int distance = 1; distance < 32; distance *= 2) {
    largest = max(largest, __shfl_xor_sync(WHOLE_WARP, largest, distance));
  }
  Coder coder(q.book, float_of(largest));
  for (int i = lane_number(); i < q.block / 2; i += 32) {
    put(q.codes + block * (q.block / 2) + i, byte_of(coder, x, i, n));
  }
  if (lane_number() == 0) store(q.absmax + block, float_of(largest));
}

}  // namespace

extern "C" int minillm_nf4_quantize(const Nf4Quantize* q, int stage, void* stream) {
  if (stage < 0 || stage > 2 || !sound(q->dtype, q->block)) return INVALID;
  int64_t blocks = (q->count + q->block - 1) / q->block;
  bool floats = q->dtype == FLOAT32;
  if (stage == 1) {
    auto kernel = floats ? quantize_v1<float> : quantize_v1<bfloat16>;
    return launch(kernel, dim3((blocks + THREADS - 1) / THREADS), THREADS, 0, stream, *q, blocks);
  }
  auto kernel = floats ? quantize_v2<float> : quantize_v2<bfloat16>;
  return launch(kernel, dim3((blocks + WARPS - 1) / WARPS), THREADS, 0, stream, *q, blocks);
}
