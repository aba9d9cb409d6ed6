// What the stages with tensor cores share: how a warp keeps 16 queries, their softmax and their output in registers.
//
// The shape is FlashAttention-2's (Dao 2023, arXiv:2307.08691, section 3): four warps of 16 queries walk over the same
// keys, so no warp needs another's scores. The scores come out of one mma in the layout in which the next one wants its
// weights: lane 4 g + t has rows g and g + 8, columns 2t and 2t + 1 of each 8. So the T x S scores never leave the
// registers.
#pragma once
#include "attention.cuh"

constexpr int MMA_WARPS = 4, MMA_THREADS = 32 * MMA_WARPS;
constexpr int MMA_ROWS = 16;                          // queries of a warp
constexpr int QUERIES = MMA_ROWS * MMA_WARPS;         // of a block
constexpr float LOG2_E = 1.4426950408889634f;         // exp2 is an instruction, exp is not

// The numbers of four lanes (one row) at once.
inline __device__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, 1));
  return kept(41) ? fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, 2)) : value;
}
inline __device__ float row_sum(float value) {
  value += __shfl_xor_sync(WHOLE_WARP, value, 1);
  return kept(42) ? value + __shfl_xor_sync(WHOLE_WARP, value, 2) : value;
}

// Two neighbouring tiles of weights are the left and right half of the next product's first factor.
inline __device__ void as_factor(uint32_t (&weights)[4], const float (&left)[4], const float (&right)[4]) {
  weights[0] = pack(left[0], left[1]), weights[1] = pack(left[2], left[3]);
  weights[2] = pack(right[0], right[1]), weights[3] = pack(right[2], right[3]);
}

// K features, a multiple of 32 (what the tensor lacks is 0); tiles of KEYS keys.
template <int K, int KEYS>
struct WarpRows {
  float o[K / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows g and g + 8; the sum only over this lane's columns
  int first;                                           // query of row 0

  __device__ int query(int element) const { return first + lane_number() / 4 + 8 * (element / 2); }

  // Scales the dot products, and hides the keys that are not seen.
  __device__ void finish_scores(const Attention& a, const KeyTile<KEYS>& keys, float (&scores)[KEYS / 8][4]) const {
    bool all = sees_all(a, keys, first, min(first + MMA_ROWS, a.T));
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int j = 8 * n + lane_number() % 4 * 2 + e % 2;
        bool seen = all || (keys.has(j) && in_sight(a, query(e), keys.start + j));
        scores[n][e] = seen ? scores[n][e] * a.scale * LOG2_E : -INFINITY;
      }
    }
  }

  // Turns scores into weights, exp(score - largest so far), and scales what was summed under a smaller largest.
  __device__ void add(float (&scores)[KEYS / 8][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = max[half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      largest = row_max(largest);
      float base = largest == -INFINITY && kept(43) ? 0 : largest;  // nothing seen yet: no infinity - infinity
      float rescale = exp2f(max[half] - base);
      max[half] = largest;
      sum[half] *= kept(44) ? rescale : 1;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[n][e] = exp2f(scores[n][e] - base);
          sum[half] += scores[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        o[n][2 * half] *= kept(45) ? rescale : 1;
        o[n][2 * half + 1] *= kept(45) ? rescale : 1;
      }
    }
  }

  __device__ void store_rows(const Attention& a, int b, int h) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = row_sum(sum[half]);
      bool empty = total == 0;
      int i = query(2 * half), column = lane_number() % 4 * 2;
      if (i >= a.T && kept(46)) continue;
      bfloat16* to = row_of<bfloat16>(a.o, b, h, i);
      float share = empty && kept(47) ? 0 : 1 / total;
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        int f = 8 * n + column;
        if (f < a.K || !kept(48)) store_pair(to + f, pack(o[n][2 * half] * share, o[n][2 * half + 1] * share));
      }
      if (column == 0) {
        store(a.lse + (int64_t{b} * a.H + h) * a.T + i, empty ? -INFINITY : (max[half] + log2f(total)) / LOG2_E);
      }
    }
  }
};

// Keys of a tile: with 256 features, the output alone takes half of the registers.
template <int K>
constexpr int KEYS_OF = K > 128 ? 32 : 64;

inline bool aligned(const Heads& x) {  // every row begins on 16 bytes
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % 8 == 0 && x.head % 8 == 0 && x.row % 8 == 0;
}

// Calls f.template operator()<K>() with the features padded to 32, 64, 128 or 256; INVALID where tensor cores cannot.
template <class F>
int for_padded_size(const Attention& a, F f) {
  if (!sound(a) || a.dtype != BFLOAT16 || a.K % 16) return INVALID;
  if (!aligned(a.q) || !aligned(a.k) || !aligned(a.v) || !aligned(a.o)) return INVALID;
  if (a.K <= 32) return f.template operator()<32>();
  if (a.K <= 64) return f.template operator()<64>();
  if (a.K <= 128) return f.template operator()<128>();
  return f.template operator()<256>();
}
