// NF4 codes to numbers. The idea: a book of 16 values fits into one register, and looking up 16 codes in it is one
// instruction (a shuffle). Eight codes are one 32-bit word.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../nf4.h"
#include "vector.h"

struct Book {
  static constexpr int PARTS = 16 / LANES;
  Vec part[PARTS];

  explicit Book(const float* pairs) {  // byte i < 16 is the codes 0 and i
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = pairs[2 * i + 1];
    for (int p = 0; p < PARTS; ++p) part[p] = load(values + p * LANES);
  }

  // The values of the lowest four bits of each lane.
  Vec operator()(UintVec codes) const {
    const IntVec lane = __builtin_bit_cast(IntVec, codes);  // a shuffle looks at no more bits than it needs
    if constexpr (PARTS == 1) return __builtin_shuffle(part[0], lane);
    if constexpr (PARTS == 2) return __builtin_shuffle(part[0], part[1], lane);
    Vec found;
    for (int i = 0; i < LANES; ++i) found[i] = part[(lane[i] & 15) / LANES][lane[i] % LANES & (LANES - 1)];
    return found;
  }
};

// The scales of `count` blocks from number `first`. Product and sum are rounded one after the other, as in torch.
inline void read_scales(const Nf4& w, int64_t first, int64_t count, float* out) {
  if (!w.absmax2) {
    std::copy_n(static_cast<const float*>(w.absmax) + first, count, out);
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, ((first + i) / 256 + 1) * 256 - first);
    const float scale = w.absmax2[(first + i) / 256];
#pragma GCC unroll 8
    for (; i < end; ++i) out[i] = w.book8[codes[first + i]] * scale;
  }
  for (int64_t i = 0; i < count; ++i) out[i] += *w.offset;
}

// Weights [first, first + count) as numbers. `scales` are those of the blocks from number first / block on.
template <class T>
void read_weights(const Nf4& w, const Book& book, const float* scales, int64_t first, int64_t count, T* out) {
  IntVec word;
  UintVec shift;
  for (int i = 0; i < LANES; ++i) word[i] = i / 8, shift[i] = 4 * (i % 8 ^ 1);
  int64_t i = 0, rest = w.block - first % w.block;  // weights left of the block
  for (const float* scale = scales; i < count; ++scale, rest = w.block) {
    const int64_t end = std::min(count, i + rest);
    const float zero = w.zero ? w.zero[first / w.block + (scale - scales)] : 0.0f;
    const uint8_t* codes = w.codes + (first + i) / 2;
    if constexpr (LANES >= 8)
      if ((first + i) % 8 == 0)
        for (; i + LANES <= end; i += LANES, codes += LANES / 2) {
          typedef std::conditional_t<LANES == 16, uint64_t, uint32_t> Bytes;  // half of LANES
          typedef Bytes BytesVec __attribute__((vector_size(4 * LANES)));
          Bytes bytes;
          std::memcpy(&bytes, codes, sizeof bytes);
          const UintVec words = __builtin_bit_cast(UintVec, BytesVec{} + bytes);
          store(out + i, (book(__builtin_shuffle(words, word) >> shift) - zero) * *scale);
        }
    for (; i < end; ++i) 
      store_one(out + i, (w.book[2 * w.codes[(first + i) / 2] + (first + i) % 2] - zero) * *scale);
  }
}
