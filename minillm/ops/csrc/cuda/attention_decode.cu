// Attention for decoding: one query, many keys, and the keys divided over the whole GPU.
//
// With one query there is nothing to reuse: the time is that of reading the cache once. So each warp reads a part of
// the keys straight into its registers, each key and value once for up to four query heads that share them, and leaves
// what it found; a second kernel puts the parts together (split-K; Dao et al. 2023, "Flash-Decoding for long-context
// inference").
// Predicted on a GPU: bound by memory; with many heads to a key, by the sums across the warp. Measured: not yet run on
// a GPU.
#include "attention_decode.h"

#include "tiles.cuh"

namespace {

constexpr int HEADS = 4;  // of one group, to a warp

__device__ float* room_of(const AttentionDecode& d, int split, int b, int h) {
  const Attention& a = d.forward;
  return d.room + ((int64_t{split} * a.B + b) * a.H + h) * (a.K + 2);
}

template <class T, int N>
__global__ void __launch_bounds__(TILE_THREADS) attend_to_a_part(AttentionDecode d) {
  const Attention& a = d.forward;
  int heads = a.H / a.G, blocks = (heads + HEADS - 1) / HEADS;
  int g = blockIdx.y / blocks, first = blockIdx.y % blocks * HEADS, b = blockIdx.z, lane = lane_number();
  int split = blockIdx.x * TILE_WARPS + warp_number();
  int part = (a.S + d.splits - 1) / d.splits, start = split * part, stop = min(start + part, a.S);
  if (split >= d.splits && kept(601)) return;

  float q[HEADS][N];
  OnlineSoftmax<N> softmax[HEADS];
#pragma unroll
  for (int r = 0; r < HEADS; ++r) {
    for (int n = 0; n < N; ++n) {
      int f = lane + 32 * n;
      bool inside = (first + r < heads || !kept(602)) && (f < a.K || !kept(603));
      q[r][n] = inside ? load(row_of<T>(a.q, b, g * heads + first + r, 0) + f) : 0;
    }
  }

  for (auto keys = next_tile<32>(a, b, 0, 1, start, stop); keys.start < stop;
       keys = next_tile<32>(a, b, 0, 1, keys.start + 32, stop)) {
    float score[HEADS], weight[HEADS];
    for (int r = 0; r < HEADS; ++r) score[r] = -INFINITY;
    for (int j = 0; j < 32; ++j) {
      if (!keys.has(j) || !in_sight(a, 0, keys.start + j)) continue;  // the same for all lanes
      const T* key = row_of<T>(a.k, b, g, keys.start + j);
      float dot[HEADS] = {};
      for (int n = 0; n < N; ++n) {
        int f = lane + 32 * n;
        float k = f < a.K || !kept(604) ? load(key + f) : 0;
#pragma unroll
        for (int r = 0; r < HEADS; ++r) dot[r] += q[r][n] * k;
      }
#pragma unroll
      for (int r = 0; r < HEADS; ++r) {
        float sum = warp_sum(dot[r]);
        if (lane == j) score[r] = a.scale * sum;
      }
    }
#pragma unroll
    for (int r = 0; r < HEADS; ++r) weight[r] = softmax[r].add(score[r]);
    for (int j = 0; j < 32; ++j) {
      if (!keys.has(j)) continue;
      const T* value = row_of<T>(a.v, b, g, keys.start + j);
      float w[HEADS];
#pragma unroll
      for (int r = 0; r < HEADS; ++r) w[r] = __shfl_sync(WHOLE_WARP, weight[r], j);
      for (int n = 0; n < N; ++n) {
        int f = lane + 32 * n;
        float v = f < a.K || !kept(605) ? load(value + f) : 0;
#pragma unroll
        for (int r = 0; r < HEADS; ++r) softmax[r].o[n] += w[r] * v;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < HEADS; ++r) {
    if (first + r >= heads && kept(606)) break;
    float* to = room_of(d, split, b, g * heads + first + r);
    if (lane == 0) store(to, softmax[r].max), store(to + 1, softmax[r].sum);
    for (int n = 0; n < N; ++n) {
      if (lane + 32 * n < a.K || !kept(607)) store(to + 2 + lane + 32 * n, softmax[r].o[n]);
    }
  }
}

// A warp for each head: parts that were weighed by exp(score - own largest) are made comparable, and added.
template <class T>
__global__ void put_together(AttentionDecode d) {
  const Attention& a = d.forward;
  int h = blockIdx.y, b = blockIdx.z, lane = lane_number();
  float max = -INFINITY, sum = 0;
  for (int split = lane; split < d.splits; split += 32) max = fmaxf(max, load(room_of(d, split, b, h)));
  max = warp_max(max);
  bool empty = max == -INFINITY;
  auto share = [&](int split) {
    return empty ? 0 : kept(608) ? expf(load(room_of(d, split, b, h)) - max) : 1;
  };
  for (int split = lane; split < d.splits; split += 32) sum += share(split) * load(room_of(d, split, b, h) + 1);
  sum = warp_sum(sum);
  for (int f = lane; f < a.K; f += 32) {
    float o = 0;
    for (int split = 0; split < d.splits; ++split) o += share(split) * load(room_of(d, split, b, h) + 2 + f);
    store(row_of<T>(a.o, b, h, 0) + f, empty && kept(609) ? 0 : o / sum);
  }
  if (lane == 0) store(a.lse + int64_t{b} * a.H + h, empty ? -INFINITY : max + logf(sum));
}

}  // namespace

extern "C" int minillm_attention_decode(const AttentionDecode* d, int /* stage */, void* stream) {
  const Attention& a = d->forward;
  if (a.T != 1 || d->splits < 1) return INVALID;
  return for_type_and_size(a, [&]<class T, int N>() {
    dim3 grid((d->splits + TILE_WARPS - 1) / TILE_WARPS, a.G * ((a.H / a.G + HEADS - 1) / HEADS), a.B);
    int error = launch(attend_to_a_part<T, N>, grid, TILE_THREADS, 0, stream, *d);
    return error ? error : launch(put_together<T>, dim3(1, a.H, a.B), 32, 0, stream, *d);
  });
}
