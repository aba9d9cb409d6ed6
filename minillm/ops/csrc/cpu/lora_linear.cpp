// A low-rank update around the library's product, with dropout that is computed again wherever it is asked.
//
// The idea: a few rows of x at a time are dropped into a room in the first cache and multiplied there, so dropout costs
// no memory and no time of memory: PyTorch writes a random number for each of x, a mask and a copy of x.
#include "../lora_linear.h"

#include "dropout.h"
#include "parallel.h"
#include "thin.h"

namespace {

constexpr int DROPPED_ROWS = 12;  // at once
constexpr int FEATURES = 128;     // of a factor's gradient, for one call of the parallel loop

// Row `row` of x as floats, from feature `first` on, after dropout.
template <class X>
void drop_row(float* to, const X* x, int64_t row, int first, int count, const Dropout& dropout) {
  const uint32_t key = row_key(dropout, row);
  const float scale = dropout.scale();
  int k = 0;
  for (; k + LANES <= count; k += LANES) store(to + k, load(x + k) * keeping(dropout, scale, key, first + k));
  if (k < count) store_first(to + k, load_first(x + k, count - k) * keeping(dropout, scale, key, first + k), count - k);
}

// out = base + drop(update), for one row; base may be null.
template <class X>
void add_dropped_row(X* out, const X* base, const float* update, int64_t row, int count, const Dropout& dropout) {
  const uint32_t key = row_key(dropout, row);
  const float scale = dropout.scale();
  for (int k = 0; k < count; k += LANES) {
    const int n = std::min(LANES, count - k);
    const Vec before = base ? load_first(base + k, n) : Vec{};
    store_first(out + k, before + load_first(update + k, n) * keeping(dropout, scale, key, k), n);
  }
}

// B (Dout, R) as floats (R, Dout).
template <class F>
std::vector<float> turned(const LoraLinear& call) {
  const F* b = static_cast<const F*>(call.b);
  std::vector<float> floats(int64_t{call.R} * call.Dout);
  for (int64_t o = 0; o < call.Dout; ++o)
    for (int r = 0; r < call.R; ++r) floats[r * int64_t{call.Dout} + o] = to_float(b[o * call.b_row + r]);
  return floats;
}

Dropout dropout_of(const LoraLinear& call) {
  return {uint32_t(call.dropout * 16777216.0f), {call.seed[0], call.seed[1]}};
}

// body(first row, count), over all rows.
template <class Body>
void each_block(const LoraLinear& call, int size, const Body& body) {
  parallel((int64_t{call.M} + size - 1) / size, [&](int64_t i) {
    const int64_t first = i * size;
    body(first, int(std::min<int64_t>(size, call.M - first)));
  });
}

template <class X, class F>
void update(const LoraLinear& call) {
  const Dropout dropout = dropout_of(call);
  const std::vector<float> b = turned<F>(call);
  const F* a = static_cast<const F*>(call.a);
  each_block(call, dropout.limit ? DROPPED_ROWS : POSITIONS, [&](int64_t first, int count) {
    const X *x = static_cast<const X*>(call.x) + first * call.x_row, *y = static_cast<const X*>(call.y);
    float* u = call.u + first * call.R;
    if (dropout.limit) {
      std::vector<float> room(int64_t{count} * call.Din);
      for (int64_t t = 0; t < count; ++t)
        drop_row(room.data() + t * call.Din, x + t * call.x_row, first + t, 0, call.Din, dropout);
      shrink(u, call.R, room.data(), call.Din, a, call.a_row, count, call.R, call.Din);
    } else {
      shrink(u, call.R, x, call.x_row, a, call.a_row, count, call.R, call.Din);
    }
    expand(static_cast<X*>(call.out) + first * call.out_row, call.out_row, y + first * call.y_row, call.y_row, u,
           call.R, call.scale, b.data(), call.Dout, count, call.R, call.Dout);
  });
}

// Rows [first, first + count) of grad_x, from their v.
template <class X, class F>
void expand_back(const LoraLinearGrad& grad, const float* v, int64_t first, int count, const Dropout& dropout) {
  const LoraLinear& call = grad.forward;
  const F* a = static_cast<const F*>(call.a);
  const X* base = grad.base ? static_cast<const X*>(grad.base) + first * grad.base_row : nullptr;
  X* out = static_cast<X*>(grad.grad_x) + first * grad.grad_x_row;
  const auto run = [&](auto* to, int64_t to_row, const auto* before, int64_t before_row) {
    expand(to, to_row, before, before_row, v, call.R, call.scale, a, call.a_row, count, call.R, call.Din);
  };
  if (!dropout.limit) return run(out, grad.grad_x_row, base, grad.base_row);
  std::vector<float> room(int64_t{count} * call.Din);
  run(room.data(), call.Din, static_cast<const float*>(nullptr), 0);
  for (int64_t t = 0; t < count; ++t)
    add_dropped_row(out + t * grad.grad_x_row, base ? base + t * grad.base_row : nullptr, room.data() + t * call.Din,
                    first + t, call.Din, dropout);
}

// put(r, feature, scale * sum over the rows of u[row][r] x[row][feature]): one thread for some features of all rows.
template <class X, class Put>
void sum_rows(const LoraLinear& call, const float* u, const void* rows, int64_t x_row, int width,
              const Dropout& dropout, const Put& put) {
  const X* x = static_cast<const X*>(rows);
  parallel((int64_t{width} + FEATURES - 1) / FEATURES, [&](int64_t i) {
    const int first = i * FEATURES, count = std::min(FEATURES, width - first), whole = whole_registers(count);
    std::vector<float> sums(int64_t{call.R} * whole), room(POSITIONS * whole);
    for (int64_t t = 0; t < call.M; t += POSITIONS) {
      const int some = std::min<int64_t>(POSITIONS, call.M - t);
      const X* block = x + t * x_row + first;
      const float* floats = reinterpret_cast<const float*>(block);
      int64_t row = x_row;
      if (dropout.limit || sizeof(X) < sizeof(float) || whole != count) {
        for (int64_t j = 0; j < some; ++j)
          if (dropout.limit)
            drop_row(&room[j * whole], block + j * x_row, t + j, first, count, dropout);
          else
            for (int k = 0; k < count; ++k) room[j * whole + k] = to_float(block[j * x_row + k]);
        floats = room.data(), row = whole;
      }
      add_rows(sums.data(), whole, u + t * call.R, call.R, floats, row, some);
    }
    for (int r = 0; r < call.R; ++r)
      for (int k = 0; k < count; ++k) put(r, int64_t{first} + k, call.scale * sums[r * whole + k]);
  });
}

template <class X, class F>
void update_backward(const LoraLinearGrad& grad) {
  const LoraLinear& call = grad.forward;
  const Dropout dropout = dropout_of(call);
  const std::vector<float> b = turned<F>(call);
  each_block(call, dropout.limit ? DROPPED_ROWS : POSITIONS, [&](int64_t first, int count) {
    const X* given = static_cast<const X*>(grad.grad) + first * grad.grad_row;
    float* v = grad.v + first * call.R;
    shrink(v, call.R, given, grad.grad_row, b.data(), call.Dout, count, call.R, call.Dout);
    if (grad.grad_x) expand_back<X, F>(grad, v, first, count, dropout);
  });
  F *grad_a = static_cast<F*>(grad.grad_a), *grad_b = static_cast<F*>(grad.grad_b);
  if (grad_a)
    sum_rows<X>(call, grad.v, call.x, call.x_row, call.Din, dropout,
                [&](int64_t r, int64_t k, float sum) { store_one(grad_a + r * call.Din + k, sum); });
  if (grad_b)
    sum_rows<X>(call, call.u, grad.grad, grad.grad_row, call.Dout, {},
                [&](int64_t r, int64_t o, float sum) { store_one(grad_b + o * call.R + r, sum); });
}

}  // namespace

// x and y may be bfloat16 with factors of float32; float32 has factors of float32. `room` and `parts` are not used.
extern "C" void minillm_cpu_lora_linear(const LoraLinear* call) {
  if (call->dtype == FLOAT32) return update<float, float>(*call);
  call->factor_dtype == FLOAT32 ? update<bfloat16, float>(*call) : update<bfloat16, bfloat16>(*call);
}

extern "C" void minillm_cpu_lora_linear_backward(const LoraLinearGrad* grad) {
  if (grad->forward.dtype == FLOAT32) return update_backward<float, float>(*grad);
  grad->forward.factor_dtype == FLOAT32 ? update_backward<bfloat16, float>(*grad)
                                        : update_backward<bfloat16, bfloat16>(*grad);
}
