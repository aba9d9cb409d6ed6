// Rotary embedding in one pass: read once, written once. Library calls make four passes (product, roll, product, sum).
#include "../rope.h"
#include "parallel.h"
#include "vector.h"

namespace {

template <class T>
void turn(const T* x, const float* cos, const float* sin, T* y, int K) {
  const int half = K / 2;
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Vec left = load(x + i), right = load(x + half + i);
    store(y + i, left * load(cos + i) + right * load(sin + i));
    store(y + half + i, right * load(cos + half + i) + left * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float left = to_float(x[i]), right = to_float(x[half + i]);
    store_one(y + i, left * cos[i] + right * sin[i]);
    store_one(y + half + i, right * cos[half + i] + left * sin[half + i]);
  }
}

template <class T>
void rope(const Rope& call) {
  parallel(int64_t(call.B) * call.T, [&](int64_t i) {
    const int64_t b = i / call.T, t = i % call.T, at = b * call.table_batch + t * call.K;
    const T* x = static_cast<const T*>(call.x.data) + b * call.x.batch + t * call.x.row;
    T* y = static_cast<T*>(call.y.data) + b * call.y.batch + t * call.y.row;
    for (int h = 0; h < call.H; ++h)
      turn(x + h * call.x.head, call.cos + at, call.sin + at, y + h * call.y.head, call.K);
  });
}

}  // namespace

extern "C" void minillm_cpu_rope(const Rope* call) {
  call->dtype == FLOAT32 ? rope<float>(*call) : rope<bfloat16>(*call);
}
