// The gradients of attention, stage 2: stage 1's two walks, by the tensor cores.
//
// All five products are those of the forward pass's stage 4 (swizzled.cuh), with the roles exchanged: where a block
// owns keys, its scores are (keys, queries), so the weights lie in the registers as the factor that grad_v and grad_k
// need, and again nothing T x S leaves them. The weights and their gradients are rounded to bfloat16 before the second
// product. Up to 128 features: beyond, the two gradients of 16 keys fill the registers, and stage 1 takes over.
// Predicted on a GPU: 5 to 10 times stage 1. Measured: not yet run on a GPU.
#include "backward.cuh"
#include "swizzled.cuh"

namespace {

constexpr int OWN_ROWS = QUERIES;  // of a block, 16 for each warp
template <int K>
constexpr int OTHER_ROWS = K > 64 ? 32 : 64;

template <int K>
struct Tiles {
  Swizzled<OWN_ROWS, K> own[2];            // keys and values, or queries and grad_o
  Swizzled<OTHER_ROWS<K>, K> other[2][2];  // two buffers of the other two
};

template <int K>
__device__ void store_rows(const Heads& x, int b, int head, int first, int limit, int features,
                           const float (&values)[K / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = first + lane_number() / 4 + 8 * half;
    if (row >= limit && kept(521)) continue;
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      int f = 8 * n + lane_number() % 4 * 2;
      if (f >= features && kept(522)) continue;
      store_pair(row_of<bfloat16>(x, b, head, row) + f, pack(values[n][2 * half], values[n][2 * half + 1]));
    }
  }
}

// Turns a score and grad_o . v into a weight and the gradient of its score.
inline __device__ void differentiate(const Attention& a, float& score, float& product, bool seen, float lse,
                                     float delta) {
  float weight = seen ? exp2f((a.scale * score - lse) * LOG2_E) : 0;
  score = weight;
  product = a.scale * weight * (product - (kept(523) ? delta : 0));
}

template <int K>
__global__ void __launch_bounds__(MMA_THREADS) attention_grad_kv(AttentionGrad grad) {
  constexpr int R = OTHER_ROWS<K>;
  const Attention& a = grad.forward;
  Tiles<K>& tile = shared<Tiles<K>>();
  int g = blockIdx.y, b = blockIdx.z, heads = a.H / a.G, mine = MMA_ROWS * warp_number();
  int begin = blockIdx.x * OWN_ROWS, end = end_of(begin, OWN_ROWS, a.S);
  int own = begin + mine + lane_number() / 4, column = lane_number() % 4 * 2;  // this lane's rows: own and own + 8
  auto [start, stop] = queries_of(a, begin, end);
  int tiles = max(0, (stop - start + R - 1) / R), steps = heads * tiles;

  auto head_of = [&](int step) { return g * heads + step / tiles; };
  auto query_of = [&](int step) { return start + step % tiles * R; };
  auto start_copies = [&](int step, int buffer) {
    if (step < steps) {
      tile.other[buffer][0].start_copy(a.q, b, head_of(step), query_of(step), a.T, a.K);
      tile.other[buffer][1].start_copy(grad.grad_o, b, head_of(step), query_of(step), a.T, a.K);
    }
    commit_copies();
  };
  tile.own[0].start_copy(a.k, b, g, begin, a.S, a.K);
  tile.own[1].start_copy(a.v, b, g, begin, a.S, a.K);
  start_copies(0, 0);
  bool key[2];
  for (int half = 0; half < 2; ++half) {
    int j = own + 8 * half;
    key[half] = (j < a.S || !kept(524)) && is_key(a, b, j);
  }
  float grad_k[K / 8][4] = {}, grad_v[K / 8][4] = {};

  for (int step = 0, buffer = 0; step < steps; ++step, buffer ^= kept(525)) {
    if (kept(526)) wait_for_copies<0>();  // this thread's part of the tile has landed
    if (kept(527)) __syncthreads();       // everyone's has; and all warps are done with the other buffer
    start_copies(step + 1, buffer ^ 1);
    auto& [queries, grads] = tile.other[buffer];
    float weights[R / 8][4] = {}, products[R / 8][4] = {};
    multiply_transposed(weights, tile.own[0], mine, queries);
    multiply_transposed(products, tile.own[1], mine, grads);
#pragma unroll
    for (int n = 0; n < R / 8; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        int i = query_of(step) + 8 * n + column + odd;
        bool query = i < a.T || !kept(528);
        float lse = query ? load(a.lse + number_of(a, b, head_of(step), i)) : 0;
        float delta = query ? load(grad.delta + number_of(a, b, head_of(step), i)) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bool seen = query && key[half] && in_sight(a, i, own + 8 * half);
          differentiate(a, weights[n][2 * half + odd], products[n][2 * half + odd], seen, lse, delta);
        }
      }
    }
    multiply(grad_v, weights, grads);
    multiply(grad_k, products, queries);
  }
  store_rows<K>(grad.grad_k, b, g, begin + mine, a.S, a.K, grad_k);
  store_rows<K>(grad.grad_v, b, g, begin + mine, a.S, a.K, grad_v);
}

template <int K>
__global__ void __launch_bounds__(MMA_THREADS) attention_grad_q(AttentionGrad grad) {
  constexpr int R = OTHER_ROWS<K>;
  const Attention& a = grad.forward;
  Tiles<K>& tile = shared<Tiles<K>>();
  int h = blockIdx.y, b = blockIdx.z, g = h / (a.H / a.G), mine = MMA_ROWS * warp_number();
  int begin = blockIdx.x * OWN_ROWS, end = end_of(begin, OWN_ROWS, a.T);
  int own = begin + mine + lane_number() / 4, column = lane_number() % 4 * 2;

  auto start_copies = [&](const KeyTile<R>& keys, int buffer) {
    if (keys.start < a.S) {
      tile.other[buffer][0].start_copy(a.k, b, g, keys.start, a.S, a.K);
      tile.other[buffer][1].start_copy(a.v, b, g, keys.start, a.S, a.K);
    }
    commit_copies();
  };
  tile.own[0].start_copy(a.q, b, h, begin, a.T, a.K);
  tile.own[1].start_copy(grad.grad_o, b, h, begin, a.T, a.K);
  auto keys = next_tile<R>(a, b, begin, end, 0, a.S);
  start_copies(keys, 0);
  float lse[2], delta[2], grad_q[K / 8][4] = {};
  for (int half = 0; half < 2; ++half) {
    int i = own + 8 * half;
    bool query = i < a.T || !kept(529);
    lse[half] = query ? load(a.lse + number_of(a, b, h, i)) : 0;
    delta[half] = query ? load(grad.delta + number_of(a, b, h, i)) : 0;
  }

  for (int buffer = 0; keys.start < a.S; buffer ^= kept(530)) {
    if (kept(531)) wait_for_copies<0>();
    if (kept(532)) __syncthreads();
    auto next = next_tile<R>(a, b, begin, end, keys.start + R, a.S);
    start_copies(next, buffer ^ 1);
    auto& [tile_k, tile_v] = tile.other[buffer];
    float weights[R / 8][4] = {}, products[R / 8][4] = {};
    multiply_transposed(weights, tile.own[0], mine, tile_k);
    multiply_transposed(products, tile.own[1], mine, tile_v);
#pragma unroll
    for (int n = 0; n < R / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int j = 8 * n + column + e % 2, half = e / 2;
        bool seen = keys.has(j) && in_sight(a, own + 8 * half, keys.start + j);
        differentiate(a, weights[n][e], products[n][e], seen, lse[half], delta[half]);
      }
    }
    multiply(grad_q, products, tile_k);
    keys = next;
  }
  store_rows<K>(grad.grad_q, b, h, begin + mine, a.T, a.K, grad_q);
}

}  // namespace

extern "C" int minillm_attention_backward_v2(const AttentionGrad* grad, void* stream) {
  const Attention& a = grad->forward;
  for (const Heads& x : {grad->grad_o, grad->grad_q, grad->grad_k, grad->grad_v}) {
    if (!aligned(x)) return INVALID;
  }
  return for_padded_size(a, [&]<int K>() {
    if constexpr (K > 128) {
      return INVALID;
    } else {
      size_t bytes = sizeof(Tiles<K>);
      int error = launch_delta<bfloat16>(*grad, stream);
      if (error) return error;
      error = launch(attention_grad_kv<K>, grid_of(a.S, OWN_ROWS, a.G, a.B), MMA_THREADS, bytes, stream, *grad);
      if (error) return error;
      return launch(attention_grad_q<K>, grid_of(a.T, OWN_ROWS, a.H, a.B), MMA_THREADS, bytes, stream, *grad);
    }
  });
}
