// Attention, stage 3: the tensor cores multiply.
//
// One mma instruction multiplies a 16 x 16 by a 16 x 8 tile of bfloat16 and sums in float32: what took a warp 64 steps.
// The work left is to bring numbers into the registers in the layout it wants (device.cuh; tensor_cores.cuh keeps them
// there). Rows of shared memory are 8 longer than the features, so that the 8 rows a warp reads at once lie in
// different banks.
// Predicted on a GPU: 5 to 10 times stage 2; bound by the single loads that gather the values' columns. Measured: not
// yet run on a GPU.
#include "tensor_cores.cuh"

namespace {

template <int K>
struct Tiles {
  static constexpr int KEYS = KEYS_OF<K>;
  using Row = Shared<bfloat16>[K + 8];
  alignas(16) Row q[QUERIES];
  Row k[KEYS], v[KEYS];
};

// Rows begin, begin + 1, .. of one head, 8 numbers at a time; 0 past the limit and past the features.
template <int R, int LENGTH>
__device__ void load_rows(Shared<bfloat16> (&tile)[R][LENGTH], const Heads& x, int b, int head, int begin, int limit,
                          int K) {
  constexpr int CHUNKS = LENGTH / 8 - 1;
  for (int e = threadIdx.x; e < R * CHUNKS; e += MMA_THREADS) {
    int row = e / CHUNKS, f = e % CHUNKS * 8;
    bool inside = (begin + row < limit || !kept(301)) && (f < K || !kept(302));
    uint4 zeros{0, 0, 0, 0};
    if (inside || kept(303)) {
      store16(&tile[row][f], inside ? load16(row_of<bfloat16>(x, b, head, begin + row) + f) : zeros);
    }
  }
}

template <int K>
__global__ void __launch_bounds__(MMA_THREADS) attention_v3(Attention a) {
  constexpr int KEYS = KEYS_OF<K>;
  Tiles<K>& tile = shared<Tiles<K>>();
  int h = blockIdx.y, b = blockIdx.z, group = h / (a.H / a.G), mine = MMA_ROWS * warp_number();
  int begin = blockIdx.x * QUERIES, end = end_of(begin, QUERIES, a.T);
  int g = lane_number() / 4, t = lane_number() % 4 * 2;
  load_rows(tile.q, a.q, b, h, begin, a.T, a.K);
  WarpRows<K, KEYS> rows;
  rows.first = begin + mine;

  for (auto keys = next_tile<KEYS>(a, b, begin, end, 0, a.S); keys.start < a.S;
       keys = next_tile<KEYS>(a, b, begin, end, keys.start + KEYS, a.S)) {
    if (kept(304)) __syncthreads();  // all warps are done with the last tile
    load_rows(tile.k, a.k, b, group, keys.start, a.S, a.K);
    load_rows(tile.v, a.v, b, group, keys.start, a.S, a.K);
    if (kept(305)) __syncthreads();  // all of this tile is there

    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int f = 0; f < K; f += 16) {
      auto* top = &tile.q[mine + g][f + t];
      auto* bottom = &tile.q[mine + g + 8][f + t];
      uint32_t q[4] = {load_pair(top), load_pair(bottom), load_pair(top + 8), load_pair(bottom + 8)};
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        auto* key = &tile.k[8 * n + g][f + t];
        uint32_t k[2] = {load_pair(key), load_pair(key + 8)};
        mma(scores[n], q, k);
      }
    }
    rows.finish_scores(a, keys, scores);
    rows.add(scores);
#pragma unroll
    for (int j = 0; j < KEYS; j += 16) {
      uint32_t weights[4];
      as_factor(weights, scores[j / 8], scores[j / 8 + 1]);
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        auto value = [&](int row) -> bfloat16 { return tile.v[j + t + row][8 * n + g]; };
        uint32_t v[2] = {pack(value(0), value(1)), pack(value(8), value(9))};
        mma(rows.o[n], weights, v);
      }
    }
  }
  rows.store_rows(a, b, h);
}

}  // namespace

extern "C" int minillm_attention_v3(const Attention* a, void* stream) {
  return for_padded_size(*a, [&]<int K>() {
    return launch(attention_v3<K>, grid_of(a->T, QUERIES, a->H, a->B), MMA_THREADS, sizeof(Tiles<K>), stream, *a);
  });
}
