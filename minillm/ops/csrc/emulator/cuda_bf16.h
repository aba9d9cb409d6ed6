// bfloat16 as CUDA's header of this name has it: the upper half of a float, rounded to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};  // the rounding could turn NaN into infinity
  uint32_t half_a_step = 0x7fff + ((bits >> 16) & 1);  // less a hair where the upper half is even
  return {static_cast<uint16_t>((bits + half_a_step) >> 16)};
}
