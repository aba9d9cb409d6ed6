// Attention for few queries, as in generation, where time goes into reading the cache.
//
// The idea: here keys lie across the lanes. All heads that share a key head read each key once, straight from the cache
// in its own type; 16 dot products are added up together (see `lane_sums`), and long caches are cut into pieces that
// several threads read at once (split-K; Dao et al. 2023, "Flash-Decoding for long-context inference").
#include <vector>

#include "attention_block.h"
#include "dots.h"
#include "parallel.h"

namespace {

constexpr int MOST_QUERIES = 16;
constexpr int PIECE = 1024;  // keys of one piece; fixed, so that the number of threads does not change the result

// The dot products of Q queries with n <= LANES / Q keys, scores[i * PIECE + j]: LANES products at a time, each in a
// register until all are added up.
template <int Q, class T>
[[gnu::noinline]] void dot_products(const float* q, int width, const T* keys, int64_t row, int n, int K,
                                    float* scores) {
  constexpr int N = LANES / Q;
  const T* key_rows[N];
  for (int j = 0; j < N; ++j) key_rows[j] = keys + std::min(j, n - 1) * row;
  Vec products[LANES] = {};
  const auto multiply = [&](int k, auto part) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const Vec key = part(key_rows[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) products[i * N + j] += key * load(q + i * width + k);
    }
  };
  int k = 0;
  for (; k + LANES <= K; k += LANES) multiply(k, [](const T* p) { return load(p); });
  if (k < K) multiply(k, [&](const T* p) { return load_first(p, K - k); });
  alignas(64) float result[LANES];
  store(result, lane_sums(products));
  for (int i = 0; i < Q; ++i) std::copy_n(result + i * N, N, scores + i * PIECE);
}

template <int Q, class T>
void score_queries(const float* q, int width, const T* keys, int64_t row, int n, int K, float* scores) {
  constexpr int N = LANES / Q;
  for (int j = 0; j < n; j += N) dot_products<Q>(q, width, keys + j * row, row, std::min(N, n - j), K, scores + j);
}

// The scores of `count` queries with n keys, four queries at a time while there are four.
template <class T>
void score(const float* q, int count, int width, const T* keys, int64_t row, int n, int K, float* scores) {
  int i = 0;
  for (; i + 4 <= count; i += 4) score_queries<4>(q + i * width, width, keys, row, n, K, scores + i * PIECE);
  if (i + 2 <= count) {
    score_queries<2>(q + i * width, width, keys, row, n, K, scores + i * PIECE);
    i += 2;
  }
  if (i < count) score_queries<1>(q + i * width, width, keys, row, n, K, scores + i * PIECE);
}

// A piece's result: for each query the maximum score, the sum of weights, and the weighted sum of values.
struct Partial {
  float top[MOST_QUERIES], total[MOST_QUERIES];
  std::vector<float> output;
};

// Hide from query i what it may not see of the keys begin .. end - 1, whose scores these are.
inline void hide_scores(const QueryBlock& block, int i, int begin, int end, float* scores) {
  const Attention& call = block.call;
  std::fill(scores + end - begin, scores + round_up(end - begin), HIDDEN);  // what fills up the last register
  const bool later = call.causal && end - 1 > block.newest[i];
  const bool earlier = call.window && begin <= block.newest[i] - call.window;
  if (!later && !earlier && !call.keys) return;
  IntVec key;
  for (int lane = 0; lane < LANES; ++lane) key[lane] = begin + lane;
  for (int j = 0; j < end - begin; j += LANES, key += LANES) {
    IntVec hidden{};
    if (later) hidden |= key > block.newest[i];
    if (earlier) hidden |= (key >= call.prefix) & (key <= block.newest[i] - call.window);
    if (call.keys) {
      ByteVec real{};
      std::memcpy(&real, call.keys + block.b * call.keys_batch + begin + j, std::min(LANES, end - begin - j));
      hidden |= __builtin_convertvector(real, IntVec) == 0;
    }
    store(scores + j, hidden ? all(HIDDEN) : load(scores + j));
  }
}

template <class T>
void read_piece(const Attention& call, const QueryBlock& block, int begin, int end, Partial& partial) {
  const int K = call.K, width = round_up(K), count = block.count;
  std::fill_n(partial.top, count, LOWEST);
  std::fill_n(partial.total, count, 0.0f);
  partial.output.assign(count * width, 0.0f);
  if (call.causal) end = std::min(end, block.newest[count - 1] + 1);
  if (call.window && begin >= call.prefix) begin = std::max(begin, block.newest[0] - call.window + 1);
  if (begin >= end || !block.sees(begin, end)) return;

  const int n = end - begin;
  Floats queries(count * width), scores(count * PIECE), room(std::is_same_v<T, float> && K == width ? 0 : n * width);
  for (int i = 0; i < count; ++i) {
    const T* q = block.row<T>(call.q, i);
    for (int k = 0; k < width; ++k) queries[i * width + k] = k < K ? call.scale * LOG2_E * to_float(q[k]) : 0.0f;
  }
  score(queries, count, width, rows_of<T>(call.k, block.b, block.g, begin), call.k.row, n, K, scores);
  for (int i = 0; i < count; ++i) {
    float* mine = scores + i * PIECE;
    hide_scores(block, i, begin, end, mine);
    Vec most = all(LOWEST), total{};
    for (int j = 0; j < n; j += LANES) most = larger(most, load(mine + j));
    const float top = partial.top[i] = largest(most);
    for (int j = 0; j < n; j += LANES) {
      const Vec weight = exp2_vec(load(mine + j) - top);
      store(mine + j, weight);
      total += weight;
    }
    partial.total[i] = sum(total);
  }
  int64_t v_row = call.v.row;
  const float* v = as_floats(rows_of<T>(call.v, block.b, block.g, begin), v_row, n, K, room, true);
  tile_product(partial.output.data(), width, scores, PIECE, 1, v, v_row, count, width, n, false);
}

template <class T>
void combine(const Attention& call, const QueryBlock& block, const Partial* partials, int pieces) {
  const int width = round_up(call.K);
  for (int i = 0; i < block.count; ++i) {
    float top = LOWEST, total = 0;
    for (int p = 0; p < pieces; ++p) top = std::max(top, partials[p].top[i]);
    std::vector<float> output(call.K, 0.0f);
    for (int p = 0; p < pieces; ++p) {
      const float share = std::exp2(partials[p].top[i] - top);
      total += share * partials[p].total[i];
      for (int k = 0; k < call.K; ++k) output[k] += share * partials[p].output[i * width + k];
    }
    for (int k = 0; k < call.K; ++k) store_one(block.row<T>(call.o, i) + k, total > 0 ? output[k] / total : 0.0f);
    call.lse[block.number(i)] = total > 0 ? (top + std::log2(total)) / LOG2_E : -INFINITY;
  }
}

template <class T>
void decode(const Attention& call) {
  const int pieces = std::max(1, (call.S + PIECE - 1) / PIECE);
  const int heads = call.B * call.G;
  std::vector<Partial> partials(int64_t(heads) * pieces);
  parallel(int64_t(heads) * pieces, [&](int64_t i) {
    const int head = i / pieces, begin = i % pieces * PIECE;
    const QueryBlock block(call, head / call.G, head % call.G, 0, MOST_QUERIES);
    read_piece<T>(call, block, begin, std::min(begin + PIECE, call.S), partials[i]);
  });
  for (int head = 0; head < heads; ++head) {
    const QueryBlock block(call, head / call.G, head % call.G, 0, MOST_QUERIES);
    combine<T>(call, block, &partials[int64_t(head) * pieces], pieces);
  }
}

}  // namespace

// For at most 16 queries per key head: T * H / G <= 16.
extern "C" void minillm_cpu_attention_decode(const Attention* call) {
  call->dtype == FLOAT32 ? decode<float>(*call) : decode<bfloat16>(*call);
}
