// The thin products of low-rank adapters: one of their sizes is the rank, so the time is that of reading the others.
//
// "Shrink" x to u = x A^T is 4 x 4 dot products at once along the features; "expand" u to y + scale u B holds 6 rows of
// 4 registers of y, and adds R rows of B to them; the gradient of a factor is a sum over the rows, u^T x.
#pragma once
#include <algorithm>
#include <vector>

#include "dots.h"
#include "tile.h"

constexpr int POSITIONS = 48;  // rows that one call of a parallel loop takes

// u[t][r] = x[t] . a[r] for T positions and R rows of a factor.
template <int T, class X, class F>
void shrink_rows(float* u, int64_t u_row, const X* x, int64_t x_row, const F* a, int64_t a_row, int R, int width) {
  constexpr int RUNS = T == 1 ? LANES / 2 : LANES / 4;
  const X* positions[T];
  for (int t = 0; t < T; ++t) positions[t] = x + t * x_row;
  for (int r = 0; r < R; r += RUNS) {
    const F* ranks[RUNS];
    for (int i = 0; i < RUNS; ++i) ranks[i] = a + std::min(r + i, R - 1) * a_row;
    float sums[LANES];
    store(sums, dots<RUNS, T, T == 1>(ranks, positions, width));
    for (int i = 0; i < std::min(RUNS, R - r); ++i)
      for (int t = 0; t < T; ++t) u[t * u_row + r + i] = sums[i * T + t];
  }
}

template <class X, class F>
void shrink(float* u, int64_t u_row, const X* x, int64_t x_row, const F* a, int64_t a_row, int T, int R, int width) {
  int t = 0;
  for (; t + 4 <= T; t += 4) shrink_rows<4>(u + t * u_row, u_row, x + t * x_row, x_row, a, a_row, R, width);
  for (; t < T; ++t) shrink_rows<1>(u + t * u_row, u_row, x + t * x_row, x_row, a, a_row, R, width);
}

// out[t] = y[t] + sum over r of u[t][r] b[r], for ROWS positions and COLUMNS registers of features (the last of `last`
// lanes); y may be null.
template <int ROWS, int COLUMNS, class X, class F>
void expand_block(X* out, int64_t out_row, const X* y, int64_t y_row, const float* u, int64_t u_row, const F* b,
                  int64_t b_row, int R, int last) {
  const auto part = [&](const auto* p, int c) {
    return c < COLUMNS - 1 || last == LANES ? load(p + c * LANES) : load_first(p + c * LANES, last);
  };
  Vec sums[ROWS][COLUMNS] = {};
  if (y)
    for (int t = 0; t < ROWS; ++t)
      for (int c = 0; c < COLUMNS; ++c) sums[t][c] = part(y + t * y_row, c);
  for (int r = 0; r < R; ++r) {
    Vec row[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) row[c] = part(b + r * b_row, c);
    for (int t = 0; t < ROWS; ++t)
      for (int c = 0; c < COLUMNS; ++c) sums[t][c] += u[t * u_row + r] * row[c];
  }
  for (int t = 0; t < ROWS; ++t)
    for (int c = 0; c < COLUMNS; ++c)
      if (X* p = out + t * out_row + c * LANES; c < COLUMNS - 1 || last == LANES)
        store(p, sums[t][c]);
      else
        store_first(p, sums[t][c], last);
}

template <int ROWS, class X, class F>
void expand_rows(X* out, int64_t out_row, const X* y, int64_t y_row, const float* u, int64_t u_row, const F* b,
                 int64_t b_row, int R, int width) {
  int i = 0;
  const auto from_y = [&] { return y ? y + i : nullptr; };
  for (; i + TILE_VECTORS * LANES <= width; i += TILE_VECTORS * LANES)
    expand_block<ROWS, TILE_VECTORS>(out + i, out_row, from_y(), y_row, u, u_row, b + i, b_row, R, LANES);
  for (; i < width; i += LANES)
    expand_block<ROWS, 1>(out + i, out_row, from_y(), y_row, u, u_row, b + i, b_row, R, std::min(LANES, width - i));
}

template <class X, class F>
void expand(X* out, int64_t out_row, const X* y, int64_t y_row, const float* u, int64_t u_row, float scale, const F* b,
            int64_t b_row, int T, int R, int width) {
  std::vector<float> scaled(6 * R);
  for (int t = 0; t < T;) {
    const int rows = T - t >= 6 ? 6 : T - t >= 4 ? 4 : 1;
    for (int i = 0; i < rows; ++i)
      for (int r = 0; r < R; ++r) scaled[i * R + r] = scale * u[(t + i) * u_row + r];
    const auto run = [&](auto expand_some) {
      expand_some(out + t * out_row, out_row, y ? y + t * y_row : nullptr, y_row, scaled.data(), R, b, b_row, R, width);
    };
    if (rows == 6) run(expand_rows<6, X, F>);
    if (rows == 4) run(expand_rows<4, X, F>);
    if (rows == 1) run(expand_rows<1, X, F>);
    t += rows;
  }
}

// sums (R, width) += u^T x for `rows` rows, of which u (rows, R) lie side by side; `width` is a multiple of LANES.
inline void add_rows(float* sums, int width, const float* u, int R, const float* x, int64_t x_row, int rows) {
  tile_product(sums, width, u, 1, R, x, x_row, R, width, rows, true);
}

inline int whole_registers(int count) { return (count + LANES - 1) / LANES * LANES; }
