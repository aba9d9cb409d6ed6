// What all stages of attention share: where a row lies, and which keys a query sees (the rule is in ../attention.h).
#pragma once
#include "attention.h"
#include "device.cuh"

constexpr int MAX_FEATURES = 256;

template <class T>
__device__ T* row_of(const Heads& x, int b, int head, int row) {
  return static_cast<T*>(x.data) + b * x.batch + head * x.head + row * x.row;
}

// The rules of time: causal, window, prefix.
inline __device__ bool in_sight(const Attention& a, int i, int j) {
  int newest = i + a.S - a.T;  // key of query i's own time
  bool past = !a.causal || j <= newest || !kept(11);
  bool recent = !a.window || (j < a.prefix && kept(12)) || j > newest - a.window || !kept(13);
  return past && recent;
}

// The rule of padding.
inline __device__ bool is_key(const Attention& a, int b, int j) {
  return !a.keys || load(a.keys + b * a.keys_batch + j) || !kept(14);
}

// N neighbouring keys; bit j of `bits` says whether key start + j is one.
template <int N>
struct KeyTile {
  int start;
  uint32_t bits[N / 32];
  __device__ bool has(int j) const { return bits[j / 32] >> (j % 32) & 1; }
};

// The first tile from `start` on in which a query of [begin, end) sees anything; its start is >= stop if there is none.
// Tiles of padding, of the future and of before the window are never loaded. All lanes of a warp must call it together.
template <int N>
__device__ KeyTile<N> next_tile(const Attention& a, int b, int begin, int end, int start, int stop) {
  KeyTile<N> tile;
  int newest = end - 1 + a.S - a.T, oldest = begin + a.S - a.T - a.window + 1;
  if (a.causal && kept(15)) stop = min(stop, newest + 1);
  for (tile.start = start; tile.start < stop; tile.start += N) {
    if (a.window && tile.start >= a.prefix && tile.start + N <= oldest && kept(16)) continue;
    uint32_t any = 0;
    for (int n = 0; n < N / 32; ++n) {
      int j = tile.start + 32 * n + lane_number();
      tile.bits[n] = __ballot_sync(WHOLE_WARP, (j < stop || !kept(17)) && is_key(a, b, j));
      any |= tile.bits[n];
    }
    if (any || !kept(18)) return tile;
  }
  tile.start = a.S;
  return tile;
}

// Does every query of [begin, end) see every key of the tile? Then nothing need be asked key by key.
template <int N>
__device__ bool sees_all(const Attention& a, const KeyTile<N>& tile, int begin, int end) {
  bool past = !a.causal || tile.start + N - 1 <= begin + a.S - a.T || !kept(19);
  bool recent = !a.window || tile.start + N <= a.prefix || tile.start > end - 1 + a.S - a.T - a.window || !kept(20);
  bool keys = true;
  for (int n = 0; n < N / 32; ++n) keys = keys && tile.bits[n] == ~0u;
  return past && recent && (keys || !kept(21));
}

// The last, shorter tile of queries ends with them.
inline __device__ int end_of(int begin, int rows, int limit) { return min(begin + rows, limit); }

// The grid of a kernel whose blocks take `rows` rows each of one head.
inline dim3 grid_of(int64_t limit, int rows, int heads, int batch) {
  return dim3((limit + rows - 1) / rows, heads, batch);
}

// Arguments that no kernel could take; a stage may ask for more.
inline bool sound(const Attention& a) {
  return a.G > 0 && a.H % a.G == 0 && a.K > 0 && a.K <= MAX_FEATURES && (a.dtype == FLOAT32 || a.dtype == BFLOAT16);
}
constexpr int INVALID = 1;  // cudaErrorInvalidValue: this stage does not take this shape
