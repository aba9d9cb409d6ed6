// A product of small matrices that stay in the first cache: C = A B, or C += A B.
//
// The idea: a block of C, 6 rows of 4 registers, is held in registers while k runs; each step loads 4 registers of B,
// and each of 6 numbers of A multiplies all of them. 24 multiplications for 10 loads keep the multiplier busy.
// A is read one number at a time, so its strides are free: A and its transpose cost the same.
#pragma once
#include "vector.h"

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2;  // AVX-512 has 32 registers, AVX 16

template <int ROWS, int VECTORS>
inline void tile_block(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_k, const float* b,
                       int64_t b_row, int depth, bool add) {
  Vec sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = add ? load(c + i * c_row + v * LANES) : Vec{};
  for (int k = 0; k < depth; ++k) {
    Vec row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * b_row + v * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i * a_row + k * a_k] * row[v];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) store(c + i * c_row + v * LANES, sums[i][v]);
}

template <int VECTORS>
inline void tile_columns(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_k, const float* b,
                         int64_t b_row, int rows, int depth, bool add) {
  int i = 0;
  for (; i + 6 <= rows; i += 6)
    tile_block<6, VECTORS>(c + i * c_row, c_row, a + i * a_row, a_row, a_k, b, b_row, depth, add);
  c += i * c_row, a += i * a_row;
  switch (rows - i) {
    case 5: return tile_block<5, VECTORS>(c, c_row, a, a_row, a_k, b, b_row, depth, add);
    case 4: return tile_block<4, VECTORS>(c, c_row, a, a_row, a_k, b, b_row, depth, add);
    case 3: return tile_block<3, VECTORS>(c, c_row, a, a_row, a_k, b, b_row, depth, add);
    case 2: return tile_block<2, VECTORS>(c, c_row, a, a_row, a_k, b, b_row, depth, add);
    case 1: return tile_block<1, VECTORS>(c, c_row, a, a_row, a_k, b, b_row, depth, add);
  }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), added to C if `add`. `columns` is a multiple of LANES.
// Element (i, k) of A stands at a[i * a_row + k * a_k]; the columns of B and C lie side by side.
inline void tile_product(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_k, const float* b,
                         int64_t b_row, int rows, int columns, int depth, bool add) {
  int j = 0;
  for (; j + TILE_VECTORS * LANES <= columns; j += TILE_VECTORS * LANES)
    tile_columns<TILE_VECTORS>(c + j, c_row, a, a_row, a_k, b + j, b_row, rows, depth, add);
  if constexpr (TILE_VECTORS == 4)
    if (j + 2 * LANES <= columns) {
      tile_columns<2>(c + j, c_row, a, a_row, a_k, b + j, b_row, rows, depth, add);
      j += 2 * LANES;
    }
  if (j < columns) tile_columns<1>(c + j, c_row, a, a_row, a_k, b + j, b_row, rows, depth, add);
}
