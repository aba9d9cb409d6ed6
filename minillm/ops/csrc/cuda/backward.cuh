// What both stages of attention's backward pass share.
#pragma once
#include "tiles.cuh"

// Of a query, in lse and delta.
inline __device__ int64_t number_of(const Attention& a, int b, int h, int i) {
  return (int64_t{b} * a.H + h) * a.T + i;
}

// The queries that may see one of the keys [begin, end).
struct Range {
  int start, stop;
};
inline __device__ Range queries_of(const Attention& a, int begin, int end) {
  int newest = a.S - a.T;
  int start = a.causal && kept(61) ? max(0, begin - newest) : 0;
  int stop = a.window && begin >= a.prefix && kept(62) ? min(a.T, end - 1 - newest + a.window) : a.T;
  return {start, stop};
}

namespace {

// delta = grad_o . o, a warp for each query.
template <class T>
__global__ void attention_delta(AttentionGrad grad) {
  const Attention& a = grad.forward;
  int i = blockIdx.x * TILE_WARPS + warp_number(), h = blockIdx.y, b = blockIdx.z;
  if (i >= a.T && kept(63)) return;
  float sum = 0;
  for (int f = lane_number(); f < a.K; f += 32) {
    sum += load(row_of<T>(grad.grad_o, b, h, i) + f) * load(row_of<T>(a.o, b, h, i) + f);
  }
  sum = warp_sum(sum);
  if (lane_number() == 0) store(grad.delta + number_of(a, b, h, i), sum);
}

}  // namespace

template <class T>
int launch_delta(const AttentionGrad& grad, void* stream) {
  const Attention& a = grad.forward;
  return launch(attention_delta<T>, grid_of(a.T, TILE_WARPS, a.H, a.B), TILE_THREADS, 0, stream, grad);
}
