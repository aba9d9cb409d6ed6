// The thin products of many adapters in one batch, each row's own matrices read where they are: nothing is gathered or
// copied, and nothing but u = x A^T (T, R) is kept between the two products.
//
// The gradients are the same two products with other matrices, and sums over the rows of each adapter, which one thread
// makes in the order of the rows: any number of threads gives the same bits.
#include "../lora.h"

#include "parallel.h"
#include "thin.h"

namespace {

constexpr int FEATURES = 512;  // of a factor's gradient, for one call of the parallel loop

template <class T>
T* at(const Rows& x, int64_t b, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + t * x.row;
}

template <class F>
const F* at(const Factors& a, int64_t n) {
  return static_cast<const F*>(a.data) + n * a.adapter;
}

int64_t adapter(const LoraGather& call, int64_t b) { return call.rows ? call.rows[b] : b; }
int rank(const LoraGather& call, int64_t n) { return call.ranks ? int(call.ranks[n]) : call.R; }
float scale(const LoraGather& call, int64_t n) { return call.scale ? call.scale[n] : 1.0f; }

// body(b, first position, count), over all positions of all rows.
template <class Body>
void each_position(const LoraGather& call, const Body& body) {
  const int64_t parts = (call.T + POSITIONS - 1) / POSITIONS;
  parallel(call.B * parts, [&](int64_t i) {
    const int first = i % parts * POSITIONS;
    body(i / parts, first, std::min(POSITIONS, call.T - first));
  });
}

template <class X, class F>
void gather(const LoraGather& call) {
  each_position(call, [&](int64_t b, int first, int count) {
    const int64_t n = adapter(call, b);
    X* out = at<X>(call.out, b, first);
    const X* y = at<const X>(call.y, b, first);
    float* u = call.u + (b * call.T + first) * call.R;
    std::fill_n(u, int64_t(count) * call.R, 0.0f);
    if (n < 0) {
      for (int t = 0; t < count; ++t) std::copy_n(y + t * call.y.row, call.Dout, out + t * call.out.row);
      return;
    }
    const int R = rank(call, n);
    shrink(u, call.R, at<X>(call.x, b, first), call.x.row, at<F>(call.a, n), call.a.rank, count, R, call.Din);
    expand(out, call.out.row, y, call.y.row, u, call.R, scale(call, n), at<F>(call.b, n), call.b.rank, count, R,
           call.Dout);
  });
}

// For one adapter and `count` features from `first`: out[r] = scale * sum over its rows' positions of u[t][r] x[t].
template <class X, class F>
void sum_rows(const LoraGather& call, int64_t n, const float* u, const Rows& x, int first, int count, F* out,
              int64_t out_row) {
  const int width = whole_registers(count);
  std::vector<float> sums(int64_t(call.R) * width), room;
  for (int b = 0; b < call.B; ++b) {
    if (adapter(call, b) != n) continue;
    for (int t = 0; t < call.T; t += POSITIONS) {
      const int positions = std::min(POSITIONS, call.T - t);
      const X* block = at<const X>(x, b, t) + first;
      const float* floats = reinterpret_cast<const float*>(block);
      int64_t row = x.row;
      if (sizeof(X) < sizeof(float) || width != count) {
        room.assign(int64_t(POSITIONS) * width, 0.0f), floats = room.data(), row = width;
        for (int i = 0; i < positions; ++i)
          for (int k = 0; k < count; ++k) room[i * width + k] = to_float(block[i * x.row + k]);
      }
      add_rows(sums.data(), width, u + (int64_t(b) * call.T + t) * call.R, call.R, floats, row, positions);
    }
  }
  const int R = rank(call, n);
  for (int r = 0; r < call.R; ++r)
    for (int k = 0; k < count; ++k)
      store_one(out + r * out_row + k, r < R ? scale(call, n) * sums[r * width + k] : 0.0f);
}

template <class X, class F>
void gather_backward(const LoraGatherGrad& grad) {
  const LoraGather& call = grad.forward;
  each_position(call, [&](int64_t b, int first, int count) {
    const int64_t n = adapter(call, b);
    float* v = grad.v + (b * call.T + first) * call.R;
    std::fill_n(v, int64_t(count) * call.R, 0.0f);
    const int R = n < 0 ? 0 : rank(call, n);
    if (R)
      shrink(v, call.R, at<X>(grad.grad, b, first), grad.grad.row, at<F>(call.b, n), call.b.rank, count, R, call.Dout);
    if (grad.grad_x.data)
      expand<X, F>(at<X>(grad.grad_x, b, first), grad.grad_x.row, nullptr, 0, v, call.R, R ? scale(call, n) : 0.0f,
                   R ? at<F>(call.a, n) : nullptr, call.a.rank, count, R, call.Din);
  });
  const auto factor = [&](const float* u, const Rows& x, int width, void* out) {
    const int64_t parts = (width + FEATURES - 1) / FEATURES;
    parallel(call.N * parts, [&](int64_t i) {
      const int64_t n = i / parts;
      const int first = i % parts * FEATURES;
      F* mine = static_cast<F*>(out) + n * call.R * width + first;
      sum_rows<X, F>(call, n, u, x, first, std::min(FEATURES, width - first), mine, width);
    });
  };
  if (grad.grad_a) factor(grad.v, call.x, call.Din, grad.grad_a);
  if (grad.grad_b) factor(call.u, grad.grad, call.Dout, grad.grad_b);
  if (!grad.grad_scale) return;
  std::vector<double> sums(call.N);
  for (int64_t b = 0; b < call.B; ++b)
    if (const int64_t n = adapter(call, b); n >= 0)
      for (int64_t i = b * call.T * call.R; i < (b + 1) * call.T * call.R; ++i)
        sums[n] += double(call.u[i]) * grad.v[i];
  std::copy(sums.begin(), sums.end(), grad.grad_scale);
}

}  // namespace

// x and y may be bfloat16 with factors of float32; float32 has factors of float32.
extern "C" void minillm_cpu_lora_gather(const LoraGather* call) {
  if (call->dtype == FLOAT32) return gather<float, float>(*call);
  call->factor_dtype == FLOAT32 ? gather<bfloat16, float>(*call) : gather<bfloat16, bfloat16>(*call);
}

extern "C" void minillm_cpu_lora_gather_backward(const LoraGatherGrad* grad) {
  if (grad->forward.dtype == FLOAT32) return gather_backward<float, float>(*grad);
  grad->forward.factor_dtype == FLOAT32 ? gather_backward<bfloat16, float>(*grad)
                                        : gather_backward<bfloat16, bfloat16>(*grad);
}
