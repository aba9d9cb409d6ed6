// Attention without its T x S table: keys pass by in tiles, and each query keeps a running maximum, sum and output
// (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, algorithm 1).
//
// The idea on a CPU: queries lie across the lanes. Scores^T = K Q^T has one query per lane, so maximum, exponential and
// sum of the softmax are plain vector operations, keys and values are read where they are, and nothing is transposed
// but the block of queries, once.
#include "attention_block.h"
#include "parallel.h"

namespace {

// One step of the online softmax: the scores of n keys become weights, and what was summed before is scaled to the new
// maximum.
void soften(float* scores, int n, int columns, float* top, float* total, float* output, int K) {
  for (int i = 0; i < columns; i += LANES) {
    Vec before = load(top + i), now = before;
    for (int j = 0; j < n; ++j) now = larger(now, load(scores + j * columns + i));
    Vec shrink = exp2_vec(before - now), added{};
    for (int j = 0; j < n; ++j) {
      Vec weight = exp2_vec(load(scores + j * columns + i) - now);
      added += weight;
      store(scores + j * columns + i, weight);
    }
    store(top + i, now);
    store(total + i, load(total + i) * shrink + added);
    for (int k = 0; k < K; ++k) store(output + k * columns + i, load(output + k * columns + i) * shrink);
  }
}

template <class T>
void forward_block(const Attention& call, const QueryBlock& block) {
  const int columns = block.columns, K = call.K;
  Floats queries(K * columns), output(K * columns), scores(KEYS * columns), room(KEYS * round_up(K));
  alignas(64) float top[QUERIES], total[QUERIES] = {};
  std::fill_n(top, QUERIES, LOWEST);
  std::fill_n(static_cast<float*>(output), K * columns, 0.0f);
  block.transposed<T>(call.q, call.scale * LOG2_E, queries);

  for (int begin = 0; begin < call.S; begin += KEYS) {
    const int end = std::min(begin + KEYS, call.S), n = end - begin;
    if (!block.sees(begin, end)) continue;
    int64_t k_row = call.k.row, v_row = call.v.row;
    const float* k = as_floats(rows_of<T>(call.k, block.b, block.g, begin), k_row, n, K, room);
    tile_product(scores, columns, k, k_row, 1, queries, columns, n, columns, K, false);
    block.hide(scores, begin, end);
    soften(scores, n, columns, top, total, output, K);
    const float* v = as_floats(rows_of<T>(call.v, block.b, block.g, begin), v_row, n, K, room);
    tile_product(output, columns, v, 1, v_row, scores, columns, K, columns, n, true);
  }

  for (int i = 0; i < block.count; ++i) {
    const float share = total[i] > 0 ? 1 / total[i] : 0;
    T* o = block.row<T>(call.o, i);
    for (int k = 0; k < K; ++k) store_one(o + k, output[k * columns + i] * share);
    call.lse[block.number(i)] = total[i] > 0 ? (top[i] + std::log2(total[i])) / LOG2_E : -INFINITY;
  }
}

template <class T>
void forward(const Attention& call) {
  const int queries = call.H / call.G * call.T, blocks = (queries + QUERIES - 1) / QUERIES;
  parallel(int64_t(call.B) * call.G * blocks, [&](int64_t i) {
    const int b = i / blocks / call.G, g = i / blocks % call.G;
    forward_block<T>(call, QueryBlock(call, b, g, i % blocks * QUERIES));
  });
}

}  // namespace

extern "C" void minillm_cpu_attention_forward(const Attention* call) {
  call->dtype == FLOAT32 ? forward<float>(*call) : forward<bfloat16>(*call);
}
