// float32 tiles of the thin products: 32 positions, 32 ranks, 32 features, in rows of 33.
#pragma once
#include "lora_gather.cuh"

constexpr int TILE_WARPS = 4, TILE_THREADS = 32 * TILE_WARPS;
constexpr int POSITIONS = 32, RANKS = 32, FEATURES = 32;  // of a tile
constexpr int OWN = 32 / TILE_WARPS;                      // rows of a tile that are a warp's own
static_assert(32 * 32 == 8 * TILE_THREADS);               // a thread loads 8 neighbours of each tile

using Tile = Shared<float>[32][33];

struct ShrinkTiles {
  Tile x, a;
};

inline __device__ void write8(Tile& tile, const float (&values)[8]) {
  int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) tile[row][column + i] = values[i];
}

// Positions begin, .. of row b, features start, ..: after dropout, and 0 past the last position and feature.
template <class X>
__device__ void load_positions(Tile& tile, const Thin& thin, const Rows& x, const Dropout& dropout, int b, int begin,
                               int start, int width) {
  int t = begin + threadIdx.x / 4, f = start + threadIdx.x % 4 * 8;
  float values[8] = {};
  if (t < thin.T || !kept(1151)) load8(values, row_of<const X>(x, b, t) + f, width - f);
  if (dropout.p > 0) {
    uint32_t key = row_key(dropout, number_of(thin, b, t));
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= keeping(dropout, key, f + i);
  }
  write8(tile, values);
}

// Ranks first, .. of a factor, features start, ..
template <class F>
__device__ void load_ranks(Tile& tile, const Factor& a, const Adapter& adapter, int first, int start, int width) {
  int r = first + threadIdx.x / 4, f = start + threadIdx.x % 4 * 8;
  float values[8] = {};
  const F* from = row_of<const F>(a, adapter.number, r) + f * a.feature;
  if (r < adapter.rank || !kept(1152)) {
    if (a.feature == 1) {
      load8(values, from, width - f);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = f + i < width || !kept(1154) ? load(from + i * a.feature) : 0;
    }
  }
  write8(tile, values);
}

// u of positions begin, .. and ranks first, ..
inline __device__ void load_u(Tile& tile, const Thin& thin, const float* u, int b, int begin, int first) {
  int t = begin + threadIdx.x / 4, r = first + threadIdx.x % 4 * 8;
  float values[8] = {};
  if (t < thin.T || !kept(1153)) load8(values, u + number_of(thin, b, t) * thin.R + r, thin.R - r);
  write8(tile, values);
}
