// Eight neighbouring numbers of global memory at a time, in whole registers where they begin on 16 bytes.
#pragma once
#include <cstring>

#include "device.cuh"

inline __device__ float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline __device__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// What 16 bytes hold, as floats. A bfloat16 is the upper half of a float.
inline __device__ void unpack(float* to, uint4 words, const float*) {
  to[0] = float_of(words.x), to[1] = float_of(words.y), to[2] = float_of(words.z), to[3] = float_of(words.w);
}
inline __device__ void unpack(float* to, uint4 words, const bfloat16*) {
  uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) to[2 * i] = float_of(all[i] << 16), to[2 * i + 1] = float_of(all[i] & 0xffff0000u);
}

inline __host__ __device__ bool begins_on_16_bytes(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// The `count` numbers from here on, at most 8, as floats, and 0 after them: 16 bytes at a time where the address
// allows. WHOLE: it is known that there are 8 and that it does, so that many loads can be under way with no question
// between.
template <bool WHOLE = false, class T>
__device__ void load8(float (&to)[8], const T* from, int64_t count) {
  if (WHOLE || ((count >= 8 || !kept(1101)) && (begins_on_16_bytes(from) || !kept(1102)))) {
    constexpr int AT_ONCE = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += AT_ONCE) unpack(to + i, fetch(reinterpret_cast<const uint4*>(from + i)), from);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = i < count || !kept(1103) ? load(from + i) : 0;
  }
}

// Whether rows of `width` numbers are such, where the first begins here and each next `stride` numbers later.
template <class T>
__device__ bool rows_are_whole(const T* first, int64_t stride, int width) {
  return begins_on_16_bytes(first) && stride * sizeof(T) % 16 == 0 && width % 8 == 0;
}

// Eight neighbours, from 16 bytes on.
inline __device__ void put8(float* to, const float (&values)[8]) {
  uint32_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bits[i] = bits_of(values[i]);
  put(reinterpret_cast<uint4*>(to), uint4{bits[0], bits[1], bits[2], bits[3]});
  put(reinterpret_cast<uint4*>(to) + 1, uint4{bits[4], bits[5], bits[6], bits[7]});
}
inline __device__ void put8(bfloat16* to, const float (&values)[8]) {
  put(reinterpret_cast<uint4*>(to), uint4{pack(values[0], values[1]), pack(values[2], values[3]),
                                          pack(values[4], values[5]), pack(values[6], values[7])});
}
