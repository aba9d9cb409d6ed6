// To NF4 and back: each in one pass, blocks in parallel.
#include <cstdlib>
#include <vector>

#include "nf4_codes.h"
#include "parallel.h"

namespace {

constexpr int64_t SOME = 1 << 16;  // weights of one call of the parallel loop

// One block, in the n > 0 first of `x`, which is 2 * LANES wide or a multiple, zeros after n. Returns its largest
// absolute value; NaN is the largest of all.
float quantize_block(const float* x, int n, const float* midpoints, uint8_t* codes, int block) {
  IntVec largest{};
  for (int i = 0; i < n; i += LANES) {
    const IntVec bits = __builtin_bit_cast(IntVec, load(x + i)) & 0x7fffffff;  // without the sign, ordered like floats
    largest = bits > largest ? bits : largest;
  }
  int32_t top = 0;
  for (int i = 0; i < LANES; ++i) top = std::max(top, largest[i]);
  const float absmax = __builtin_bit_cast(float, top), divisor = absmax > 0 ? absmax : 1.0f;
  IntVec even, odd;
  for (int i = 0; i < LANES; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  const auto nearest = [&](const float* p) {  // the number of midpoints below
    const Vec value = load(p) / divisor;
    IntVec code{};
    for (int i = 0; i < 15; ++i) code -= value > midpoints[i];
    return code;
  };
  for (int i = 0; i < block; i += 2 * LANES) {
    const IntVec low = nearest(x + i), high = nearest(x + i + LANES);
    const IntVec bytes = (__builtin_shuffle(low, high, even) << 4) | __builtin_shuffle(low, high, odd);
    for (int j = 0; j < std::min(LANES, (block - i) / 2); ++j) codes[i / 2 + j] = bytes[j];
  }
  return absmax;
}

template <class T>
void quantize(const Nf4Quantize& call) {
  float midpoints[15];
  for (int i = 0; i < 15; ++i) midpoints[i] = (call.book[2 * i + 3] + call.book[2 * i + 1]) / 2;
  const int64_t blocks = (call.count + call.block - 1) / call.block, some = std::max<int64_t>(SOME / call.block, 1);
  const int width = (call.block + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  parallel((blocks + some - 1) / some, [&](int64_t i) {
    std::vector<float> x(width);
    for (int64_t b = i * some; b < std::min((i + 1) * some, blocks); ++b) {
      const int n = std::min<int64_t>(call.block, call.count - b * call.block);
      const T* from = static_cast<const T*>(call.weight) + b * call.block;
      for (int k = 0; k < width; ++k) x[k] = k < n ? to_float(from[k]) : 0.0f;
      call.absmax[b] = quantize_block(x.data(), n, midpoints, call.codes + b * (call.block / 2), call.block);
    }
  });
}

template <class T>
void dequantize(const Nf4Dequantize& call) {
  const Nf4& w = call.weight;
  const Book book(w.book);
  const int64_t blocks = (w.count + w.block - 1) / w.block, some = std::max<int64_t>(SOME / w.block, 1);
  parallel((blocks + some - 1) / some, [&](int64_t i) {
    const int64_t first = i * some, last = std::min(first + some, blocks);
    std::vector<float> scales(last - first);
    read_scales(w, first, last - first, scales.data());
    const int64_t begin = first * w.block, end = std::min(last * w.block, w.count);
    read_weights(w, book, scales.data(), begin, end - begin, static_cast<T*>(call.out) + begin);
  });
}

}  // namespace

extern "C" void minillm_cpu_nf4_quantize(const Nf4Quantize* call) {
  call->dtype == FLOAT32 ? quantize<float>(*call) : quantize<bfloat16>(*call);
}

extern "C" void minillm_cpu_nf4_dequantize(const Nf4Dequantize* call) {
  call->dtype == FLOAT32 ? dequantize<float>(*call) : dequantize<bfloat16>(*call);
}
