// From NF4 to numbers, in one pass.
//
// Stage 1: a thread for each byte of codes, which finds its two values in a table of 256 pairs in global memory.
// Stage 2: a thread takes 8 codes, one 32-bit word, looks them up in a table of 16 in shared memory, asks once for
// their scale, and writes 16 or 32 bytes at once.
// Predicted on a GPU: stage 2 takes as long as memory does for 2.5 bytes a weight in bfloat16: 10 us for 4096 x 4096.
// Measured: not yet run on a GPU.
#include "nf4.cuh"

namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void dequantize_v1(Nf4Dequantize d) {
  int64_t i = 2 * (int64_t{blockIdx.x} * THREADS + threadIdx.x);
  T* out = static_cast<T*>(d.out);
  if (i < d.weight.count || !kept(1221)) store(out + i, weight_of(d.weight, i));
  if (i + 1 < d.weight.count || !kept(1222)) store(out + i + 1, weight_of(d.weight, i + 1));
}

template <class T>
__global__ void __launch_bounds__(THREADS) dequantize_v2(Nf4Dequantize d) {
  Table& table = shared<Table>();
  table.fill(d.weight.book);
  int64_t i = 8 * (int64_t{blockIdx.x} * THREADS + threadIdx.x);
  if (i >= d.weight.count && kept(1223)) return;
  uint32_t word = fetch(reinterpret_cast<const uint32_t*>(d.weight.codes + i / 2));
  float scale = scale_of(d.weight, i / d.weight.block), zero = zero_of(d.weight, i / d.weight.block), values[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) values[n] = (table(word, n) - zero) * scale;
  T* out = static_cast<T*>(d.out) + i;
  if (i + 8 <= d.weight.count || !kept(1224)) {
    put8(out, values);
  } else {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (i + n < d.weight.count || !kept(1225)) store(out + n, values[n]);
    }
  }
}

template <class T>
int dequantize(const Nf4Dequantize& d, int stage, void* stream) {
  if (stage == 1) {
    return launch(dequantize_v1<T>, dim3((d.weight.count + 2 * THREADS - 1) / (2 * THREADS)), THREADS, 0, stream, d);
  }
  dim3 grid((d.weight.count + 8 * THREADS - 1) / (8 * THREADS));
  return launch(dequantize_v2<T>, grid, THREADS, sizeof(Table), stream, d);
}

}  // namespace

// Stage 2 wants 8 codes of a word to share their scale, and whole registers. 0: the latest that takes this weight.
extern "C" int minillm_nf4_dequantize(const Nf4Dequantize* d, int stage, void* stream) {
  if (stage < 0 || stage > 2 || !sound(d->dtype, d->weight.block)) return INVALID;
  bool words = d->weight.block % 8 == 0 && begins_on_16_bytes(d->weight.codes) && begins_on_16_bytes(d->out);
  if (stage == 2 && !words) return INVALID;
  if (stage == 0) stage = words ? 2 : 1;
  return d->dtype == FLOAT32 ? dequantize<float>(*d, stage, stream) : dequantize<bfloat16>(*d, stage, stream);
}
