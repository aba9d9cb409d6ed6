// float32 tiles for the kernels without tensor cores: rows in shared memory, and a softmax that is never all there.
//
// A warp takes a few rows (queries, or keys in the backward pass) against 32 of the other kind. For the scores each
// lane takes one of the 32; for the sums over them each lane takes every 32nd feature, N in all, and hears of the 32
// weights from the lanes that have them.
#pragma once
#include "attention.cuh"

constexpr int TILE_WARPS = 4, TILE_THREADS = 32 * TILE_WARPS;
constexpr int OWN = 4;                      // rows of a warp
constexpr int ROWS = OWN * TILE_WARPS;      // rows of a block
constexpr int COLUMNS = 32;                 // rows of the other kind, one for each lane

// Rows begin, begin + 1, .. of one head; what lies past `limit` or past the K features is 0. A row of the tile may be
// longer than the features: with an odd length, 32 lanes that read one column use 32 banks of the memory.
template <class T, int R, int LENGTH>
__device__ void load_rows(Shared<float> (&tile)[R][LENGTH], const Heads& x, int b, int head, int begin, int limit,
                          int K) {
  constexpr int FEATURES = LENGTH / 32 * 32;
  for (int e = threadIdx.x; e < R * FEATURES; e += TILE_THREADS) {
    int row = e / FEATURES, f = e % FEATURES;
    bool inside = (begin + row < limit || !kept(31)) && (f < K || !kept(32));
    if (inside || kept(33)) tile[row][f] = inside ? load(row_of<T>(x, b, head, begin + row) + f) : 0;
  }
}

// Source: Milakov and Gimelshein 2018, arXiv:1805.02867: softmax while the scores come in, tile by tile. A new largest
// score makes all that was summed before too large by exp(new - old): it is scaled down then.
template <int N>
struct OnlineSoftmax {
  float max = -INFINITY, sum = 0;
  float o[N] = {};  // features lane, lane + 32, ..

  // Takes in one score of each lane, -infinity for a key not seen; returns exp(score - max), this lane's weight.
  __device__ float add(float score) {
    float larger = fmaxf(max, warp_max(score));
    float base = larger == -INFINITY && kept(34) ? 0 : larger;  // nothing seen yet: infinity - infinity is no number
    float weight = expf(score - base), rescale = expf(max - base);
    sum = sum * (kept(35) ? rescale : 1) + warp_sum(weight);
    for (int n = 0; n < N; ++n) o[n] *= kept(36) ? rescale : 1;
    max = larger;
    return weight;
  }
};

// Calls f.template operator()<T, N>() for the number type and the 32-feature groups of this call.
template <class F>
int for_type_and_size(const Attention& a, F f) {
  if (!sound(a)) return INVALID;
  auto sized = [&]<class T>() {
    if (a.K <= 32) return f.template operator()<T, 1>();
    if (a.K <= 64) return f.template operator()<T, 2>();
    if (a.K <= 128) return f.template operator()<T, 4>();
    return f.template operator()<T, 8>();
  };
  return a.dtype == FLOAT32 ? sized.template operator()<float>() : sized.template operator()<bfloat16>();
}
