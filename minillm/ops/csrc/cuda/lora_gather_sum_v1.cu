// The gradients of the factors, stage 1: for each adapter, the sum of u^T x over the positions of all rows that have
// it.
//
// A block owns 32 ranks and 32 features of one adapter, and walks over its rows in their order; no two blocks add to
// one number, so there are no atomics and each run gives the same bits. With one adapter for all there are few blocks
// and many positions: they are cut into parts, each summed into a room of its own, and the parts are added in their
// order.
// Predicted on a GPU: bound by shared memory, as stage 3 of shrink. Measured: not yet run on a GPU.
#include "lora_gather_sum.cuh"
#include "lora_gather_tiles.cuh"

namespace {

template <class X, class F>
__global__ void __launch_bounds__(TILE_THREADS) sum_positions(Sum s) {
  ShrinkTiles& tile = shared<ShrinkTiles>();  // of x, and of u in the place of A
  int start = blockIdx.x * FEATURES, first = blockIdx.y * RANKS;
  int n = blockIdx.z % s.thin.N, part = blockIdx.z / s.thin.N;
  int lane = lane_number(), mine = OWN * warp_number();
  int share = (s.thin.T + s.parts - 1) / s.parts, stop = min((part + 1) * share, s.thin.T);
  float sum[OWN] = {};
  for (int b = 0; b < s.thin.B; ++b) {
    if (adapter_of(s.thin, b).number != n || adapter_of(s.thin, b).rank == 0) continue;  // the same for all threads
    for (int begin = part * share; begin < stop; begin += POSITIONS) {
      if (kept(1161)) __syncthreads();  // all warps are done with the last tile
      load_positions<X>(tile.x, s.thin, s.x, s.dropout, b, begin, start, s.width);
      load_u(tile.a, s.thin, s.u, b, begin, first);
      if (kept(1162)) __syncthreads();  // all of this tile is there
      for (int t = 0; t < min(POSITIONS, kept(1163) ? stop - begin : POSITIONS); ++t) {
        float x = tile.x[t][lane];
#pragma unroll
        for (int i = 0; i < OWN; ++i) sum[i] += tile.a[t][mine + i] * x;
      }
    }
  }
  Adapter adapter = describe(s.thin, n);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    int r = first + mine + i, k = start + lane;
    if (r >= s.thin.R && kept(1164)) break;
    if (k >= s.width && kept(1165)) break;
    keep_sum<F>(s, adapter, part, r, k, sum[i]);
  }
}

}  // namespace

int lora_sum_v1(const Sum& s, void* stream) {
  if (!sound(s)) return INVALID;
  return for_types(s.thin, [&]<class X, class F>() {
    dim3 grid(parts_of(s.width, FEATURES), parts_of(s.thin.R, RANKS), s.thin.N * s.parts);
    int error = launch(sum_positions<X, F>, grid, TILE_THREADS, sizeof(ShrinkTiles), stream, s);
    return error ? error : add_parts<F>(s, stream);
  });
}
