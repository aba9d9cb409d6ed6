// What the thin products on tensor cores share: 16 bytes from memory are registers of an mma as they are.
//
// In a sum over k it does not matter which k is called the first. An mma wants of each lane the numbers 2t, 2t + 1,
// 2t + 8 and 2t + 9 of a row; we give it 8 neighbours 8t, .. 8t + 7 of a row instead, four for one mma and four for a
// second, from both factors alike. Nor does it matter which column is called the first: to the eight lanes 4 g + t we
// give the columns 8 g, .. 8 g + 7, each to an mma of its own, and so find the results of 8 neighbours in one lane.
// So nothing need pass through shared memory to come into another layout.
#pragma once
#include "lora_gather.cuh"

constexpr int MMA_POSITIONS = 32;  // of a warp: two tiles of 16, which share what is read of the factor

struct Eight {
  uint32_t pair[4];  // of bfloat16
};

inline __device__ Eight load_eight(const bfloat16* from, bool inside) {
  if (!inside) return {};
  uint4 words = load16(from);
  return {words.x, words.y, words.z, words.w};
}

// The numbers that dropout keeps; the others 0. What it multiplies all of them by, the sum is multiplied by.
inline __device__ void drop(Eight& x, const Dropout& dropout, uint32_t key, int column) {
  if (dropout.p == 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low = keeping(dropout, key, column + 2 * i) > 0 ? 0xffffu : 0;
    uint32_t high = keeping(dropout, key, column + 2 * i + 1) > 0 ? 0xffff0000u : 0;
    x.pair[i] &= low | high;
  }
}
inline __device__ float kept_scale(const Dropout& dropout) { return 1 / (1 - dropout.p); }

// Number j of each as a pair.
inline __device__ uint32_t pair_of(const Eight& low, const Eight& high, int j) {
  uint32_t a = low.pair[j / 2], b = high.pair[j / 2];
  return j % 2 ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
}

// 16 x 16 floats, each as the sum of two bfloat16: 16 bits of precision instead of 8, for a second mma. This lane's are
// columns 4t, .. 4t + 3 of rows g and g + 8.
struct Precise {
  uint32_t high[4], low[4];

  __device__ void set(int half, const float (&row)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bfloat16 a = __float2bfloat16(row[2 * i]), b = __float2bfloat16(row[2 * i + 1]);
      high[half + 2 * i] = pack(a, b);
      float rest_a = row[2 * i] - __bfloat162float(a), rest_b = row[2 * i + 1] - __bfloat162float(b);
      low[half + 2 * i] = kept(1181) ? pack(rest_a, rest_b) : 0;
    }
  }
};

// sum += u w, for 32 x 16 floats u and 16 rows of 64 numbers w, of which this lane has rows 4t, .. 4t + 3, columns
// 8g, ..
inline __device__ void multiply(float (&sum)[2][8][4], const Precise (&u)[2], const uint32_t (&w)[8][2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      mma(sum[m][j], u[m].high, w[j]);
      mma(sum[m][j], u[m].low, w[j]);
    }
  }
}
inline __device__ void turn(uint32_t (&w)[8][2], const Eight (&rows)[4]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) w[j][0] = pair_of(rows[0], rows[1], j), w[j][1] = pair_of(rows[2], rows[3], j);
}

// Every row begins on 16 bytes.
inline bool aligned(const Rows& x) { return begins_on_16_bytes(x.data) && x.batch % 8 == 0 && x.row % 8 == 0; }
inline bool aligned(const Factor& a) {
  return begins_on_16_bytes(a.data) && a.adapter % 8 == 0 && a.rank % 8 == 0 && a.feature == 1;
}
inline bool for_tensor_cores(const Thin& thin, int width) {
  return sound(thin) && thin.dtype == BFLOAT16 && thin.factor_dtype == BFLOAT16 && width % 8 == 0;
}
