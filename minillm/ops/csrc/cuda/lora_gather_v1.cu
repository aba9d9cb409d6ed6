// Multi-adapter LoRA, stage 1: a thread for each number of the result.
//
// Each row has its own two matrices, and they are read where they are: nothing is gathered or copied, as in PyTorch's
// way (a copy of both matrices for each row, then a batched product). But neighbouring threads read rows of A that
// lie apart, so that of 32 bytes that come from memory one thread uses 2 at a time; and each row of x is read R
// times.
// Predicted on a GPU: bound by such reads: a tenth of the memory's speed. Measured: not yet run on a GPU.
#include "lora_gather.cuh"

namespace {

constexpr int THREADS = 128;

template <class X, class F>
__global__ void shrink(Shrink s) {
  int64_t e = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  int b = blockIdx.y, t = e / s.thin.R, r = e % s.thin.R;
  if (t >= s.thin.T && kept(1121)) return;
  Adapter adapter = adapter_of(s.thin, b);
  const X* x = row_of<const X>(s.x, b, t);
  const F* a = row_of<const F>(s.a, adapter.number, r);
  uint32_t key = row_key(s.dropout, number_of(s.thin, b, t));
  float sum = 0;
  for (int k = 0; k < s.width && (r < adapter.rank || !kept(1122)); ++k) {
    sum += load(x + k) * keeping(s.dropout, key, k) * load(a + k * s.a.feature);
  }
  store(s.u + number_of(s.thin, b, t) * s.thin.R + r, sum);
}

template <class X, class F>
__global__ void expand(Expand x) {
  int64_t e = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  int b = blockIdx.y, t = e / x.width, o = e % x.width;
  if (t >= x.thin.T && kept(1123)) return;
  Adapter adapter = adapter_of(x.thin, b);
  const float* u = x.u + number_of(x.thin, b, t) * x.thin.R;
  float sum = 0;
  for (int r = 0; r < adapter.rank; ++r) {
    sum += load(u + r) * load(row_of<const F>(x.b, adapter.number, r) + o * x.b.feature);
  }
  sum *= adapter.scale * keeping(x.dropout, row_key(x.dropout, number_of(x.thin, b, t)), o);
  float before = x.y.data ? load(row_of<const X>(x.y, b, t) + o) : 0;
  store(row_of<X>(x.out, b, t) + o, before + sum);
}

}  // namespace

int lora_shrink_v1(const Shrink& s, void* stream) {
  return for_types(s.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(int64_t{s.thin.T} * s.thin.R, THREADS), s.thin.B);
    return launch(shrink<X, F>, grid, THREADS, 0, stream, s);
  });
}

int lora_expand_v1(const Expand& x, void* stream) {
  return for_types(x.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(int64_t{x.thin.T} * x.width, THREADS), x.thin.B);
    return launch(expand<X, F>, grid, THREADS, 0, stream, x);
  });
}
