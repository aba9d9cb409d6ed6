// Dropout that is not stored: whether a number is dropped is computed from the seed and its place (ops/dropout.py).
#pragma once
#include "vector.h"

struct Dropout {
  uint32_t limit;  // of 2^24 parts of the numbers so many are dropped; 0: none
  uint32_t seed[2];

  float scale() const { return 16777216.0f / (16777216 - limit); }  // of what is kept
};

template <class Word>  // one number of 32 bits, or a register of them
Word mix(Word x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

inline uint32_t row_key(const Dropout& d, int64_t row) {
  const uint32_t low = mix(d.seed[0] + uint32_t(row)), high = mix(d.seed[1] + uint32_t(row >> 32));
  return mix(low ^ (high + 0x9e3779b9u));
}

// What the LANES numbers of a row from `column` on are multiplied by: 0, or scale.
inline Vec keeping(const Dropout& d, float scale, uint32_t key, int column) {
  UintVec counter;
  for (int lane = 0; lane < LANES; ++lane) counter[lane] = uint32_t(lane) * 0x9e3779b9u;
  const IntVec kept = mix(counter + (key + uint32_t(column) * 0x9e3779b9u)) >> 8 >= d.limit;
  return __builtin_bit_cast(Vec, __builtin_bit_cast(IntVec, all(scale)) & kept);
}
