// Attention, stage 5: copying, multiplying and taking exponents are done by different hands, at the same time.
//
// In stage 4 every warp starts copies, waits, multiplies and takes exponents in turn. On Hopper the copy engine needs
// one thread to ask, and the tensor cores need none while they multiply. So the block is divided (Shah et al. 2024,
// arXiv:2407.08608, section 3.1):
//   warp group 0      one thread keeps the copies coming, as far ahead as there is room; it never computes
//   warp groups 1, 2  64 queries each; while one takes exponents, the other has the tensor cores
// No barrier stops them all: each buffer has an mbarrier that says "full" and one that says "free".
// boxes.cuh has the tiles, hopper.cuh the instructions. Left out, for the reader to add: the scores of the next tile
// started before this tile's exponents (section 3.2 there).
// Predicted on a GPU: 1.25 to 1.5 times the library's FlashAttention-2. Measured: compiled and emulated, not yet run on
// a GPU.
#include "boxes.cuh"

namespace {

constexpr int CONSUMERS = 2;  // warp groups
constexpr int BLOCK = 64 * CONSUMERS, THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int BUFFERS = 2;
template <int K>
constexpr int TILE = K > 128 ? 64 : 128;  // keys

template <int K>
struct Tiles {
  Boxes<BLOCK, K> q;
  Boxes<TILE<K>, K> k[BUFFERS], v[BUFFERS];
  Mbarrier q_full, k_full[BUFFERS], v_full[BUFFERS], free[BUFFERS];
};

#ifdef MINILLM_HOPPER

// Where tile n of the keys lies. parity: of the phase of its mbarriers that this use of the buffer completes.
struct Turn {
  int n = 0;
  __device__ int buffer() const { return kept(451) ? n % BUFFERS : 0; }
  __device__ int parity() const { return kept(469) ? n / BUFFERS % 2 : 0; }
};

template <int K>
__device__ void produce(Tiles<K>& tile, const Attention& a, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                        int b, int h, int begin, int end) {
  constexpr int KEYS = TILE<K>;
  int group = h / (a.H / a.G);
  bool asks = lane_number() == 0;
  if (asks) {
    arrive_and_expect(tile.q_full, kept(452) ? tile.q.BYTES : 2 * tile.q.BYTES);  // the queries are here
    tile.q.start_copy(q, b, h, begin, tile.q_full);
  }
  Turn turn;
  for (auto keys = next_tile<KEYS>(a, b, begin, end, 0, a.S); keys.start < a.S;
       keys = next_tile<KEYS>(a, b, begin, end, keys.start + KEYS, a.S), ++turn.n) {
    if (!asks) continue;
    int i = turn.buffer();
    if (kept(453)) wait(tile.free[i], turn.parity() ^ kept(454));  // the first turn finds all buffers free
    arrive_and_expect(tile.k_full[i], kept(455) ? tile.k[i].BYTES : tile.k[i].BYTES / 2);  // these keys are here
    tile.k[i].start_copy(k, b, group, keys.start, tile.k_full[i]);
    if (kept(456)) arrive_and_expect(tile.v_full[i], tile.v[i].BYTES);  // these values are here
    tile.v[i].start_copy(v, b, group, keys.start, tile.v_full[i]);
  }
}

template <int K>
__device__ void consume(Tiles<K>& tile, const Attention& a, int b, int h, int begin, int end) {
  constexpr int KEYS = TILE<K>;
  int mine = 64 * (threadIdx.x / WARPGROUP - 1);  // row of this warp group
  WarpRows<K, KEYS> rows;
  rows.first = begin + mine + MMA_ROWS * (warp_number() % 4);

  if (kept(457)) wait(tile.q_full, 0);
  Turn turn;
  for (auto keys = next_tile<KEYS>(a, b, begin, end, 0, a.S); keys.start < a.S;
       keys = next_tile<KEYS>(a, b, begin, end, keys.start + KEYS, a.S), ++turn.n) {
    int i = turn.buffer();
    float scores[KEYS / 8][4];
    if (kept(458)) wait(tile.k_full[i], turn.parity());
    if (kept(459)) fence_registers(scores);
#pragma unroll
    for (int f = 0; f < K; f += 16) multiply_transposed_async(scores, tile.q.rows(mine, f), tile.k[i].rows(0, f), f > 0);
    if (kept(460)) commit_products();
    if (kept(461)) wait_for_products(scores);
    rows.finish_scores(a, keys, scores);
    rows.add(scores);

    uint32_t weights[KEYS / 16][4];
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) as_factor(weights[j], scores[2 * j], scores[2 * j + 1]);
    if (kept(462)) wait(tile.v_full[i], turn.parity());
    if (kept(463)) fence_registers(rows.o, weights);
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) multiply_async(rows.o, weights[j], tile.v[i].columns(16 * j));
    if (kept(464)) commit_products();
    if (kept(465)) wait_for_products(rows.o);
    if (lane_number() == 0 && kept(466)) arrive(tile.free[i]);  // all warps are done with this buffer
  }
  rows.store_rows(a, b, h);
}

template <int K>
__global__ void __launch_bounds__(THREADS, 1)
    attention_v5(Attention a, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                 const __grid_constant__ TensorMap v) {
  auto& tile = shared_from_1024<Tiles<K>>();
  int h = blockIdx.y, b = blockIdx.z, begin = blockIdx.x * BLOCK, end = end_of(begin, BLOCK, a.T);
  if (threadIdx.x == 0) {
    init(tile.q_full, 1);
    for (int i = 0; i < BUFFERS; ++i) {
      init(tile.k_full[i], 1);  // the thread that asks; and the bytes
      init(tile.v_full[i], 1);
      init(tile.free[i], 4 * CONSUMERS);  // one thread of each warp that reads
    }
    if (kept(467)) announce_barriers();
  }
  if (kept(468)) __syncthreads();  // nobody comes to an mbarrier before it is made

  if (threadIdx.x < WARPGROUP) {
    give_registers<24>();
    if (warp_number() == 0) produce<K>(tile, a, q, k, v, b, h, begin, end);
  } else {
    take_registers<240>();
    consume<K>(tile, a, b, h, begin, end);
  }
}

#else

// What other GPUs get: no launch fits it, and the launcher asks before it tries.
template <int K>
__global__ void __launch_bounds__(32)
    attention_v5(Attention, const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                 const __grid_constant__ TensorMap) {}

#endif

template <int K>
int run(const Attention& a, void* stream) {
  int error = 0;
  if (!runs_on_hopper(attention_v5<K>, THREADS, error)) return error ? error : INVALID;
  TensorMap q, k, v;
  bool none = a.S == 0;  // then no copy of keys is ever asked for, but a map must be of something
  error = encode(q, a.q, a.K, a.T, a.H, a.B, BLOCK);
  if (!error) error = none ? encode(k, a.q, a.K, a.T, a.H, a.B, BLOCK) : encode(k, a.k, a.K, a.S, a.G, a.B, TILE<K>);
  if (!error) error = none ? encode(v, a.q, a.K, a.T, a.H, a.B, BLOCK) : encode(v, a.v, a.K, a.S, a.G, a.B, TILE<K>);
  if (error) return error;
  return launch(attention_v5<K>, grid_of(a.T, BLOCK, a.H, a.B), THREADS, sizeof(Tiles<K>) + SWIZZLE_REPEAT - 1, stream,
                a, q, k, v);
}

}  // namespace

extern "C" int minillm_attention_v5(const Attention* a, void* stream) {
  if (a->B == 0 || a->H == 0 || a->T == 0) return sound(*a) ? 0 : INVALID;
  return for_padded_size(*a, [&]<int K>() { return run<(K < 64 ? 64 : K)>(*a, stream); });
}
