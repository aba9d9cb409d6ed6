// The machine's widest register as a C++ type (GCC's vector extension): 16 floats with AVX-512, 8 with AVX, else 4.
// `a * b + c` on vectors is one fused instruction per register; a scalar among vectors stands for all lanes.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common.h"

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));  // also the result of a comparison: -1 true, 0 false
typedef int8_t ByteVec __attribute__((vector_size(LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LANES)));

struct bfloat16 {  // the upper half of a float's bits
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);  // compiles to one unaligned load
  return x;
}

inline Vec load(const bfloat16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_bit_cast(Vec, __builtin_convertvector(half, UintVec) << 16);
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// Rounded to the nearest, ties to even; a NaN stays one.
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bfloat16* p, float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = nan ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bfloat16* p, Vec x) {
  UintVec bits = __builtin_bit_cast(UintVec, x);
  UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  HalfVec half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : rounded, HalfVec);
  std::memcpy(p, &half, sizeof half);
}

// The first n lanes only; the others are read as 0 and left unwritten.
template <class T>
Vec load_first(const T* p, int n) {
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T>
void store_first(T* p, Vec x, int n) {
  T part[LANES];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

inline Vec all(float x) { return Vec{} + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The upper half of the lanes moved onto the lower, then a quarter, ...: after log2(LANES) steps lane 0 has met all.
inline Vec lanes_up(Vec x, int by) {
  IntVec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i + by;
  return __builtin_shuffle(x, lane);  // lane numbers wrap around
}

inline float sum(Vec x) {
#pragma GCC unroll 4
  for (int by = LANES / 2; by > 0; by /= 2) x += lanes_up(x, by);
  return x[0];
}

inline float largest(Vec x) {
#pragma GCC unroll 4
  for (int by = LANES / 2; by > 0; by /= 2) x = larger(x, lanes_up(x, by));
  return x[0];
}

// 2^x for x <= 0 (a rounding error above is fine), within 2e-7 of it; 0 below 2^-126.
// x = n + r with n whole: 2^n is a shift of the exponent's bits, 2^r = e^(r ln 2) a short series for |r| <= 1/2.
inline Vec exp2_vec(Vec x) {
  IntVec tiny = x < -126.0f;
  x = tiny ? all(-126.0f) : x;
  IntVec n = __builtin_convertvector(x - 0.5f, IntVec);  // cuts towards 0, which for x <= 0 rounds to the nearest
  Vec r = (x - __builtin_convertvector(n, Vec)) * 0.693147180559945f;
  Vec series = all(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  Vec power = __builtin_bit_cast(Vec, (n + 127) << 23);
  return tiny ? Vec{} : series * power;
}
