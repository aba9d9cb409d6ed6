// A linear layer for at most 4 rows, as in generation, where all time goes into reading the weight once.
//
// The idea: a core has its memory busy only if it waits for many places at once. One run through the weight from front
// to back is one place; a block of outputs is therefore cut into 8 runs, read side by side. The rows of x share what is
// read. A low-rank update costs next to nothing: u = scale * A x are R more inputs, and B is R more columns of W.
#include "../linear.h"

#include <algorithm>
#include <vector>

#include "dots.h"
#include "parallel.h"

namespace {

constexpr int64_t BLOCK_BYTES = 1 << 19;  // of the weight, for one call of the parallel loop

template <int M>
struct Inputs {
  const float* rows[M];
  std::vector<float> room;

  // The rows of x as floats: where they are, if they are floats.
  template <class T>
  Inputs(const T* x, int64_t row, int width) {
    if constexpr (sizeof(T) < sizeof(float)) room.resize(int64_t(M) * width);
    for (int m = 0; m < M; ++m) {
      if constexpr (sizeof(T) == sizeof(float)) {
        rows[m] = x + m * row;
      } else {
        float* wide = room.data() + int64_t(m) * width;
        for (int i = 0; i < width; ++i) wide[i] = to_float(x[m * row + i]);
        rows[m] = wide;
      }
    }
  }
};

// u (M, R) = scale * x A^T.
template <int M, class F>
std::vector<float> shrink(const Linear& call, const Inputs<M>& x) {
  constexpr int RUNS = LANES / 4;
  const F* a = static_cast<const F*>(call.a);
  std::vector<float> u(int64_t{M} * call.R);
  for (int r = 0; r < call.R; r += RUNS) {
    const F* rows[RUNS];
    for (int i = 0; i < RUNS; ++i) rows[i] = a + std::min(r + i, call.R - 1) * call.a_row;
    float sums[LANES];
    store(sums, dots<RUNS, M, true>(rows, x.rows, call.Din));
    for (int i = 0; i < std::min(RUNS, call.R - r); ++i)
      for (int m = 0; m < M; ++m) u[int64_t(m) * call.R + r + i] = call.scale * sums[i * M + m];
  }
  return u;
}

// Outputs [begin, begin + RUNS * length): run r has those from begin + r * length on.
template <int M, int RUNS, class T, class F>
void read_runs(const Linear& call, const Inputs<M>& x, const Inputs<M>& u, int begin, int length) {
  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
  const F* b = static_cast<const F*>(call.b);
  T* y = static_cast<T*>(call.y);
  for (int o = begin; o < begin + length; ++o) {
    const T* rows[RUNS];
    for (int r = 0; r < RUNS; ++r) rows[r] = weight + (o + int64_t(r) * length) * call.weight_row;
    Vec products[LANES] = {};
    add_products<RUNS, M, true>(products, rows, x.rows, call.Din);
    if (call.R) {
      const F* thin[RUNS];
      for (int r = 0; r < RUNS; ++r) thin[r] = b + (o + int64_t(r) * length) * call.b_row;
      add_products<RUNS, M, false>(products, thin, u.rows, call.R);
    }
    float sums[LANES];
    store(sums, lane_sums(products));
    for (int r = 0; r < RUNS; ++r)
      for (int m = 0; m < M; ++m) {
        const int64_t at = o + int64_t(r) * length;
        store_one(y + m * call.y_row + at, sums[r * M + m] + (bias ? to_float(bias[at]) : 0.0f));
      }
  }
}

template <int M, class T, class F>
void linear_rows(const Linear& call) {
  constexpr int RUNS = M <= 2 ? LANES / 2 : LANES / 4;
  const Inputs<M> x(static_cast<const T*>(call.x), call.x_row, call.Din);
  const std::vector<float> thin = shrink<M, F>(call, x);
  const Inputs<M> u(thin.data(), call.R, call.R);
  const int64_t row_bytes = std::max<int64_t>(call.Din * sizeof(T), 1);
  const int block = std::max<int64_t>(BLOCK_BYTES / row_bytes / RUNS, 1) * RUNS;
  parallel((int64_t(call.Dout) + block - 1) / block, [&](int64_t i) {
    const int begin = i * block, count = std::min(block, call.Dout - begin), length = count / RUNS;
    read_runs<M, RUNS, T, F>(call, x, u, begin, length);
    read_runs<M, 1, T, F>(call, x, u, begin + length * RUNS, count - length * RUNS);
  });
}

template <class T, class F>
void linear(const Linear& call) {
  switch (call.M) {
    case 1: return linear_rows<1, T, F>(call);
    case 2: return linear_rows<2, T, F>(call);
    case 3: return linear_rows<3, T, F>(call);
    case 4: return linear_rows<4, T, F>(call);
  }
}

}  // namespace

// A bfloat16 weight may have factors of float32; a float32 weight has factors of float32.
extern "C" void minillm_cpu_linear(const Linear* call) {
  if (call->dtype == FLOAT32) return linear<float, float>(*call);
  call->factor_dtype == FLOAT32 ? linear<bfloat16, float>(*call) : linear<bfloat16, bfloat16>(*call);
}
