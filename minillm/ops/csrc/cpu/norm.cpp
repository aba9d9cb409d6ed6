// RMS normalisation of a row while it is in the first cache: read twice, written once. As library calls it is six
// operations, of which a single row, as in decoding, pays for being six and not for its features.
#include <cmath>

#include "../norm.h"
#include "parallel.h"
#include "vector.h"

namespace {

template <class T>
float sum_of_squares(const T* x, int D) {
  Vec squares{};
  int i = 0;
  for (; i + LANES <= D; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < D; ++i) total += to_float(x[i]) * to_float(x[i]);
  return total;
}

// What is normalised is rounded to T before the weight, as the definition says.
inline Vec rounded(Vec x, const float*) { return x; }
inline Vec rounded(Vec x, const bfloat16*) {
  bfloat16 half[LANES];
  store(half, x);
  return load(half);
}

template <class T>
void normalise(const T* x, const T* weight, T* y, int D, float eps) {
  const float inverse = 1 / std::sqrt(sum_of_squares(x, D) / D + eps);
  int i = 0;
  for (; i + LANES <= D; i += LANES) store(y + i, rounded(load(x + i) * inverse, x) * load(weight + i));
  if (const int rest = D - i)
    store_first(y + i, rounded(load_first(x + i, rest) * inverse, x) * load_first(weight + i, rest), rest);
}

template <class T>
void rms_norm(const RmsNorm& call) {
  const int64_t D = call.D;
  parallel(call.rows, [&](int64_t row) {
    normalise(static_cast<const T*>(call.x) + row * D, static_cast<const T*>(call.weight),
              static_cast<T*>(call.y) + row * D, call.D, call.eps);
  });
}

}  // namespace

extern "C" void minillm_cpu_rms_norm(const RmsNorm* call) {
  call->dtype == FLOAT32 ? rms_norm<float>(*call) : rms_norm<bfloat16>(*call);
}
