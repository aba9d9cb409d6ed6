// What the stages of NF4 share: where codes and scales lie, and their table.
#pragma once
#include "global.cuh"
#include "nf4.h"

constexpr int INVALID = 1;  // cudaErrorInvalidValue: this stage does not take this shape

// The scale of one block of weights.
inline __device__ float scale_of(const Nf4& w, int64_t block) {
  if (!w.absmax2) return load(static_cast<const float*>(w.absmax) + block);
  uint8_t code = fetch(static_cast<const uint8_t*>(w.absmax) + block);
  return multiply_then_add(load(w.book8 + code), load(w.absmax2 + block / 256), load(w.offset));
}

inline __device__ float zero_of(const Nf4& w, int64_t block) { return w.zero ? load(w.zero + block) : 0; }

inline __device__ float weight_of(const Nf4& w, int64_t i) {
  uint8_t byte = fetch(w.codes + i / 2);
  return (load(w.book + 2 * byte + i % 2) - zero_of(w, i / w.block)) * scale_of(w, i / w.block);
}

// The 16 values. In shared memory each has a bank of its own: 32 lanes look up 32 codes at once, whatever these are.
struct Table {
  Shared<float> value[16];

  __device__ void fill(const float* book) {  // byte i < 16 is the codes 0 and i
    if (threadIdx.x < 16) value[threadIdx.x] = load(book + 2 * threadIdx.x + 1);
    if (kept(1201)) __syncthreads();
  }
  // The value of code i of 8 in a word: two a byte, the first in the high four bits.
  __device__ float operator()(uint32_t word, int i) const { return value[word >> 4 * (i ^ 1) & 15]; }
};

inline bool sound(int32_t dtype, int32_t block) {
  return (dtype == FLOAT32 || dtype == BFLOAT16) && block > 0 && block % 2 == 0;
}
