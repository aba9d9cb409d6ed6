// Attention, stage 4: memory keeps up with the tensor cores.
//
// Three changes to stage 3, each to the way from global memory to the registers:
//   cp.async     the next keys and values are on their way into a second buffer while this tile is multiplied
//   ldmatrix     one instruction fills the registers of four 8 x 8 tiles, transposed if asked: no column is gathered
//   swizzle      chunk c of row r lies at c ^ (r % 8), so that 8 rows of one column fall into different banks without
//                the padding of stage 3
// swizzled.cuh has the last two.
// Predicted on a GPU: about 1.5 times stage 3, near the library's FlashAttention-2. Measured: not yet run on a GPU.
#include "swizzled.cuh"

namespace {

template <int K>
struct Tiles {
  static constexpr int KEYS = KEYS_OF<K>;
  Swizzled<QUERIES, K> q;
  Swizzled<KEYS, K> k[2], v[2];
};

template <int K>
__global__ void __launch_bounds__(MMA_THREADS) attention_v4(Attention a) {
  constexpr int KEYS = KEYS_OF<K>;
  Tiles<K>& tile = shared<Tiles<K>>();
  int h = blockIdx.y, b = blockIdx.z, group = h / (a.H / a.G), mine = MMA_ROWS * warp_number();
  int begin = blockIdx.x * QUERIES, end = end_of(begin, QUERIES, a.T);
  WarpRows<K, KEYS> rows;
  rows.first = begin + mine;

  auto start_copies = [&](const KeyTile<KEYS>& keys, int buffer) {
    if (keys.start < a.S) {
      tile.k[buffer].start_copy(a.k, b, group, keys.start, a.S, a.K);
      tile.v[buffer].start_copy(a.v, b, group, keys.start, a.S, a.K);
    }
    commit_copies();
  };
  auto keys = next_tile<KEYS>(a, b, begin, end, 0, a.S);
  tile.q.start_copy(a.q, b, h, begin, a.T, a.K);
  start_copies(keys, 0);

  for (int buffer = 0; keys.start < a.S; buffer ^= kept(401)) {
    if (kept(402)) wait_for_copies<0>();  // this thread's part of the tile has landed
    if (kept(403)) __syncthreads();       // everyone's has; and all warps are done with the other buffer
    auto next = next_tile<KEYS>(a, b, begin, end, keys.start + KEYS, a.S);
    start_copies(next, buffer ^ 1);

    float scores[KEYS / 8][4] = {};
    multiply_transposed(scores, tile.q, mine, tile.k[buffer]);
    rows.finish_scores(a, keys, scores);
    rows.add(scores);
    multiply(rows.o, scores, tile.v[buffer]);
    keys = next;
  }
  rows.store_rows(a, b, h);
}

}  // namespace

extern "C" int minillm_attention_v4(const Attention* a, void* stream) {
  return for_padded_size(*a, [&]<int K>() {
    return launch(attention_v4<K>, grid_of(a->T, QUERIES, a->H, a->B), MMA_THREADS, sizeof(Tiles<K>), stream, *a);
  });
}
