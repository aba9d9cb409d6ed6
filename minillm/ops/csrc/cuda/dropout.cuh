// Dropout that is not stored: whether a number is dropped is computed from the seed and its place, and computed again,
// with the same answer, in the backward pass. So nothing the size of the input is kept, and any kernel may ask for any
// number in any order (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": a counter, mixed).
// ops/dropout.py defines it, and cpu/dropout.h does the same.
#pragma once
#include "device.cuh"

struct Dropout {
  float p;  // probability that a number is dropped; the others are divided by 1 - p
  uint32_t seed[2];
};

// Every bit of the result depends on every bit of x. Source: Wellons 2018, "Prospecting for hash functions", lowbias32.
inline __device__ uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

inline __device__ uint32_t row_key(const Dropout& d, int64_t row) {
  uint32_t low = mix(d.seed[0] + static_cast<uint32_t>(row)), high = mix(d.seed[1] + static_cast<uint32_t>(row >> 32));
  return mix(low ^ (high + 0x9e3779b9u));
}

// What x at (row, column) is multiplied by: 0 or 1 / (1 - p). 24 bits of the mixed counter are compared with p.
inline __device__ float keeping(const Dropout& d, uint32_t key, int column) {
  if (d.p == 0) return 1;
  uint32_t random = mix(key + static_cast<uint32_t>(column) * 0x9e3779b9u) >> 8;
  return random >= d.p * 16777216.0f ? 1 / (1 - d.p) : 0;
}
