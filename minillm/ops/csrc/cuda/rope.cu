// Rotary embedding, one stage: it is bound by memory, and one pass over it is all there is to win.
//
// A thread turns one pair of features (i, i + K/2): two numbers read, two written, and the table's cosines and sines
// come from the cache after the first head. PyTorch's operations (product, roll, product, sum) pass over memory four times.
// Predicted on a GPU: 4 times faster than these, near the speed of a copy. Measured: not yet run on a GPU.
#include "../rope.h"
#include "device.cuh"

namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void rope(Rope r) {
  int half = r.K / 2;
  int64_t e = int64_t{blockIdx.x} * THREADS + threadIdx.x, pairs = int64_t{r.H} * half;
  int h = e / half, i = e % half, t = blockIdx.y, b = blockIdx.z;
  if (e >= pairs && kept(701)) return;
  const T* x = static_cast<const T*>(r.x.data) + b * r.x.batch + h * r.x.head + t * r.x.row;
  T* y = static_cast<T*>(r.y.data) + b * r.y.batch + h * r.y.head + t * r.y.row;
  const float* cos = r.cos + b * r.table_batch + int64_t{t} * r.K;
  const float* sin = r.sin + b * r.table_batch + int64_t{t} * r.K;
  float left = load(x + i), right = load(x + half + i);
  store(y + i, left * load(cos + i) + right * load(sin + i));
  store(y + half + i, right * load(cos + half + i) + left * load(sin + half + i));
}

}  // namespace

extern "C" int minillm_rope(const Rope* r, int stage, void* stream) {
  if (stage > 1 || r->K % 2 || r->T > 65535 || r->B > 65535) return 1;  // cudaErrorInvalidValue
  auto kernel = r->dtype == FLOAT32 ? rope<float> : rope<bfloat16>;
  dim3 grid((int64_t{r->H} * r->K / 2 + THREADS - 1) / THREADS, r->T, r->B);
  return launch(kernel, grid, THREADS, 0, stream, *r);
}
