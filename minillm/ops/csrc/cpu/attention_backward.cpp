// The gradients of attention from the output and the log-sum-exp: the weights are computed again tile by tile instead
// of being kept (Dao et al. 2022, arXiv:2205.14135, algorithm 4).
//
//   P = exp(scale Q K^T - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta) scale,  dQ = dS K,  dK = dS^T Q
//
// The idea: one row's key head is one piece of work. Its gradients of keys and values are summed by one thread, block
// of queries after block, so nothing is added atomically and the result is the same in every run.
#include "attention_block.h"
#include "parallel.h"

namespace {

// What a block of queries brings: as columns for products with keys, as rows for sums over queries.
struct Given {
  Floats q, grad_o, q_rows, grad_o_rows, grad_q;
  alignas(64) float lse[QUERIES], delta[QUERIES];

  explicit Given(int K)
      : q(K * QUERIES), grad_o(K * QUERIES), q_rows(QUERIES * round_up(K)), grad_o_rows(QUERIES * round_up(K)),
        grad_q(K * QUERIES) {}

  template <class T>
  void fill(const QueryBlock& block, const AttentionGrad& call) {
    const Attention& forward = call.forward;
    const int K = forward.K;
    block.transposed<T>(forward.q, forward.scale * LOG2_E, q);
    block.transposed<T>(call.grad_o, 1.0f, grad_o);
    for (int i = 0; i < block.count; ++i) {
      copy_row(block.row<T>(forward.q, i), q_rows + i * round_up(K), K);
      copy_row(block.row<T>(call.grad_o, i), grad_o_rows + i * round_up(K), K);
      const T* o = block.row<T>(forward.o, i);
      float dot = 0;
      for (int k = 0; k < K; ++k) dot += grad_o[k * block.columns + i] * to_float(o[k]);
      const float sum = forward.lse[block.number(i)];
      lse[i] = std::isinf(sum) ? -LOWEST : sum * LOG2_E;  // a query that saw nothing has weights of 2^-huge, 0
      delta[i] = dot;
    }
    std::fill(lse + block.count, lse + block.columns, -LOWEST);
    std::fill(delta + block.count, delta + block.columns, 0.0f);
    std::fill_n(static_cast<float*>(grad_q), K * block.columns, 0.0f);
  }

  template <class T>
  static void copy_row(const T* from, float* to, int K) {
    for (int k = 0; k < round_up(K); ++k) to[k] = k < K ? to_float(from[k]) : 0.0f;
  }
};

// scores -> P in place, and dP -> dS in place.
void differentiate(float* scores, float* grads, int n, const QueryBlock& block, const Given& given, float scale) {
  for (int i = 0; i < block.columns; i += LANES) {
    const Vec lse = load(given.lse + i), delta = load(given.delta + i);
    for (int j = 0; j < n; ++j) {
      const int at = j * block.columns + i;
      const Vec weight = exp2_vec(load(scores + at) - lse);
      store(scores + at, weight);
      store(grads + at, weight * (load(grads + at) - delta) * scale);
    }
  }
}

template <class T>
void backward_head(const AttentionGrad& call, int b, int g) {
  const Attention& forward = call.forward;
  const int K = forward.K, width = round_up(K), queries = forward.H / forward.G * forward.T;
  Floats grad_k(int64_t(forward.S) * width), grad_v(int64_t(forward.S) * width);
  std::fill_n(static_cast<float*>(grad_k), int64_t(forward.S) * width, 0.0f);
  std::fill_n(static_cast<float*>(grad_v), int64_t(forward.S) * width, 0.0f);
  Floats scores(KEYS * QUERIES), grads(KEYS * QUERIES), k_room(KEYS * width), v_room(KEYS * width);
  Given given(K);

  for (int first = 0; first < queries; first += QUERIES) {
    const QueryBlock block(forward, b, g, first);
    const int columns = block.columns, count = block.count;
    given.fill<T>(block, call);
    for (int begin = 0; begin < forward.S; begin += KEYS) {
      const int end = std::min(begin + KEYS, forward.S), n = end - begin;
      if (!block.sees(begin, end)) continue;
      int64_t k_row = forward.k.row, v_row = forward.v.row;
      const float* k = as_floats(rows_of<T>(forward.k, b, g, begin), k_row, n, K, k_room);
      const float* v = as_floats(rows_of<T>(forward.v, b, g, begin), v_row, n, K, v_room);
      tile_product(scores, columns, k, k_row, 1, given.q, columns, n, columns, K, false);
      block.hide(scores, begin, end);
      tile_product(grads, columns, v, v_row, 1, given.grad_o, columns, n, columns, K, false);
      differentiate(scores, grads, n, block, given, forward.scale);
      const int64_t at = int64_t(begin) * width;
      tile_product(grad_v + at, width, scores, columns, 1, given.grad_o_rows, width, n, width, count, true);
      tile_product(grad_k + at, width, grads, columns, 1, given.q_rows, width, n, width, count, true);
      tile_product(given.grad_q, columns, k, 1, k_row, grads, columns, K, columns, n, true);
    }
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < K; ++k) store_one(block.row<T>(call.grad_q, i) + k, given.grad_q[k * columns + i]);
  }
  for (int j = 0; j < forward.S; ++j)
    for (int k = 0; k < K; ++k) {
      store_one(rows_of<T>(call.grad_k, b, g, j) + k, grad_k[int64_t(j) * width + k]);
      store_one(rows_of<T>(call.grad_v, b, g, j) + k, grad_v[int64_t(j) * width + k]);
    }
}

template <class T>
void backward(const AttentionGrad& call) {
  const int G = call.forward.G;
  parallel(int64_t(call.forward.B) * G, [&](int64_t i) { backward_head<T>(call, i / G, i % G); });
}

}  // namespace

extern "C" void minillm_cpu_attention_backward(const AttentionGrad* call) {
  call->forward.dtype == FLOAT32 ? backward<float>(*call) : backward<bfloat16>(*call);
}
