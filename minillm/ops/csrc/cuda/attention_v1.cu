// Attention, stage 1: one thread for each query.
//
// The obvious loops. A thread reads all the keys of its query twice: once to know the largest score, so that exp()
// cannot overflow, once to weigh the values. Each key is read anew by every query, and the running output (K floats a
// thread) is too large for registers: it waits for memory nearly all of the time.
// Predicted on a GPU: far slower than any library. Measured: not yet run on a GPU.
#include "attention.cuh"

namespace {

constexpr int QUERIES = 64;

template <class T>
__device__ float score(const Attention& a, const T* q, const T* k) {
  float dot = 0;
  for (int f = 0; f < a.K; ++f) dot += load(q + f) * load(k + f);
  return a.scale * dot;
}

template <class T>
__global__ void attention_v1(Attention a) {
  int i = blockIdx.x * QUERIES + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
  int g = h / (a.H / a.G);  // H / G neighbouring heads share their keys and values
  if (i >= a.T && kept(101)) return;
  const T* q = row_of<T>(a.q, b, h, i);

  float max = -INFINITY;
  for (int j = 0; j < a.S; ++j) {
    if (in_sight(a, i, j) && is_key(a, b, j)) max = fmaxf(max, score(a, q, row_of<T>(a.k, b, g, j)));
  }
  float sum = 0, o[MAX_FEATURES];
  for (int f = 0; f < a.K; ++f) o[f] = 0;
  for (int j = 0; j < a.S; ++j) {
    if (!in_sight(a, i, j) || !is_key(a, b, j)) continue;
    float weight = expf(score(a, q, row_of<T>(a.k, b, g, j)) - (kept(102) ? max : 0));
    const T* v = row_of<T>(a.v, b, g, j);
    sum += weight;
    for (int f = 0; f < a.K; ++f) o[f] += weight * load(v + f);
  }

  bool empty = sum == 0 && kept(103);  // nothing was seen
  T* to = row_of<T>(a.o, b, h, i);
  for (int f = 0; f < a.K; ++f) store(to + f, empty ? 0 : o[f] / (kept(104) ? sum : 1));
  store(a.lse + (int64_t{b} * a.H + h) * a.T + i, empty ? -INFINITY : max + logf(sum));
}

}  // namespace

extern "C" int minillm_attention_v1(const Attention* a, void* stream) {
  if (!sound(*a)) return INVALID;
  auto kernel = a->dtype == FLOAT32 ? attention_v1<float> : attention_v1<bfloat16>;
  return launch(kernel, grid_of(a->T, QUERIES, a->H, a->B), QUERIES, 0, stream, *a);
}
