// What forward and backward share: which queries a block holds, which keys they may see, tiles as floats.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "../attention.h"
#include "tile.h"

constexpr int QUERIES = 64;  // of a block: they lie across the lanes of registers
constexpr int KEYS = 64;     // of a tile
constexpr float HIDDEN = -2e30f, LOWEST = -1e30f;  // a hidden score, and where the running maximum starts: above it
constexpr float LOG2_E = 1.44269504088896f;        // the softmax is computed with powers of 2

// Floats on whole cache lines.
struct Floats {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> data;
  explicit Floats(int64_t n) : data(static_cast<float*>(::operator new[](n * sizeof(float), std::align_val_t(64)))) {}
  operator float*() const { return data.get(); }
};

inline int round_up(int n) { return (n + LANES - 1) / LANES * LANES; }

// Some queries of row b that read the key head g. They are numbered position by position, and within a position head
// by head: all H / G heads that share keys share the work of reading them.
struct QueryBlock {
  const Attention& call;
  int b, g, first, count, columns;  // count queries from number `first`; columns: count, up to whole registers
  alignas(64) int32_t newest[QUERIES];  // the newest key that each may see if the call is causal, its own position

  QueryBlock(const Attention& call, int b, int g, int first, int limit = QUERIES)
      : call(call), b(b), g(g), first(first) {
    count = std::min(limit, heads() * call.T - first);
    columns = round_up(count);
    for (int i = 0; i < columns; ++i) newest[i] = position(std::min(i, count - 1)) + call.S - call.T;
  }
  int heads() const { return call.H / call.G; }
  int position(int i) const { return (first + i) / heads(); }
  int head(int i) const { return g * heads() + (first + i) % heads(); }

  template <class T>
  T* row(const Heads& x, int i) const {
    return static_cast<T*>(x.data) + b * x.batch + head(i) * x.head + position(i) * x.row;
  }
  int64_t number(int i) const { return (int64_t(b) * call.H + head(i)) * call.T + position(i); }  // in lse and delta

  // Whether any of these queries may see any of the keys [begin, end).
  bool sees(int begin, int end) const {
    if (call.causal && begin > newest[count - 1]) return false;
    if (call.window && begin >= call.prefix && end - 1 <= newest[0] - call.window) return false;
    if (!call.keys) return true;
    const uint8_t* keys = call.keys + b * call.keys_batch;
    return std::any_of(keys + begin, keys + end, [](uint8_t key) { return key != 0; });
  }

  // Set the scores (keys x columns) of what may not be seen to HIDDEN.
  void hide(float* scores, int begin, int end) const {
    bool later = call.causal && end - 1 > newest[0];
    bool earlier = call.window && begin <= newest[count - 1] - call.window;
    for (int key = begin; key < end; ++key, scores += columns) {
      bool padding = call.keys && !call.keys[b * call.keys_batch + key];
      if (!padding && !later && !earlier) continue;
      for (int i = 0; i < columns; i += LANES) {
        IntVec newest_of = *reinterpret_cast<const IntVec*>(newest + i);
        IntVec hidden = IntVec{} - int(padding);
        if (later) hidden |= newest_of < key;
        if (earlier && key >= call.prefix) hidden |= newest_of - call.window >= key;
        store(scores + i, hidden ? all(HIDDEN) : load(scores + i));
      }
    }
  }

  // The rows of x as columns: out[k][i] = factor * x[query i][k], with zeros for queries that fill up a register.
  template <class T>
  void transposed(const Heads& x, float factor, float* out) const {
    for (int i = 0; i < columns; ++i) {
      const T* from = row<T>(x, std::min(i, count - 1));
      for (int k = 0; k < call.K; ++k) out[k * columns + i] = i < count ? factor * to_float(from[k]) : 0.0f;
    }
  }
};

// `n` rows of K numbers as floats: where they are if they are floats already, converted into `room` if not, or if K
// must be whole registers (`padded`). `stride` is the distance of their rows, first the old one, then the new.
template <class T>
const float* as_floats(const T* rows, int64_t& stride, int n, int K, float* room, bool padded = false) {
  if constexpr (std::is_same_v<T, float>)
    if (!padded || K % LANES == 0) return rows;
  int width = round_up(K);
  for (int j = 0; j < n; ++j) {
    int k = 0;
    for (; k + LANES <= K; k += LANES) store(room + j * width + k, load(rows + j * stride + k));
    if (k < K) store(room + j * width + k, load_first(rows + j * stride + k, K - k));
  }
  stride = width;
  return room;
}

template <class T>
T* rows_of(const Heads& x, int b, int g, int begin) {
  return static_cast<T*>(x.data) + b * x.batch + g * x.head + begin * x.row;
}
