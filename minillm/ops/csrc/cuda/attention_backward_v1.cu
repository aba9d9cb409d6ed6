// The gradients of attention, stage 1: everything recomputed, nothing T x S stored, nothing added up by several blocks.
//
// With p the weights, dp = grad_o . v and delta = grad_o . o (the part of dp that the softmax takes back):
//   ds = scale p (dp - delta)
//   grad_v = sum over queries of p grad_o,  grad_k = sum over queries of ds q,  grad_q = sum over keys of ds k
// (Dao et al. 2022, arXiv:2205.14135, appendix B.4). p = exp(scale q.k - lse) is computed again from the one number per
// query that the forward pass kept. A block owns 16 keys and walks over the queries, then another kernel's blocks own
// 16 queries and walk over the keys: the scores are computed twice, but no two blocks write to one place, so there are
// no atomics and each run gives the same bits.
// Predicted on a GPU: bound by float32 arithmetic, as stage 2 of the forward pass. Measured: not yet run on a GPU.
#include "backward.cuh"

namespace {

template <int N>
struct Tiles {
  Shared<float> own[2][ROWS][32 * N];            // keys and values, or queries and grad_o
  Shared<float> other[2][COLUMNS][32 * N + 1];   // the other two
};

// dot[m][r] = row `lane` of other[m] . row `mine` + r of own[m]
template <int N>
__device__ void multiply(float (&dot)[2][OWN], const Tiles<N>& tile, int K) {
  int lane = lane_number(), mine = OWN * warp_number();
  for (int f = 0; f < K; ++f) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float other = tile.other[m][lane][f];
#pragma unroll
      for (int r = 0; r < OWN; ++r) dot[m][r] += tile.own[m][mine + r][f] * other;
    }
  }
}

// Rows begin + OWN * warp .. of a gradient.
template <class T, int N>
__device__ void store_rows(const Heads& x, int b, int head, int begin, int limit, int K,
                           const float (&values)[OWN][N]) {
#pragma unroll
  for (int r = 0; r < OWN; ++r) {
    int row = begin + OWN * warp_number() + r;
    if (row >= limit && kept(501)) break;
    for (int n = 0; n < N; ++n) {
      int f = lane_number() + 32 * n;
      if (f < K || !kept(502)) store(row_of<T>(x, b, head, row) + f, values[r][n]);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(TILE_THREADS, 3) attention_grad_kv(AttentionGrad grad) {
  const Attention& a = grad.forward;
  Tiles<N>& tile = shared<Tiles<N>>();
  int g = blockIdx.y, b = blockIdx.z, lane = lane_number(), mine = OWN * warp_number();
  int begin = blockIdx.x * ROWS, end = end_of(begin, ROWS, a.S);
  load_rows<T>(tile.own[0], a.k, b, g, begin, a.S, a.K);
  load_rows<T>(tile.own[1], a.v, b, g, begin, a.S, a.K);
  bool key[OWN];
  for (int r = 0; r < OWN; ++r) {
    int j = begin + mine + r;
    key[r] = (j < a.S || !kept(503)) && is_key(a, b, j);
  }
  float grad_k[OWN][N] = {}, grad_v[OWN][N] = {};

  auto [start, stop] = queries_of(a, begin, end);
  for (int h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); ++h) {
    for (int first = start; first < stop; first += COLUMNS) {
      if (kept(504)) __syncthreads();  // all warps are done with the last tile
      load_rows<T>(tile.other[0], a.q, b, h, first, a.T, a.K);
      load_rows<T>(tile.other[1], grad.grad_o, b, h, first, a.T, a.K);
      if (kept(505)) __syncthreads();  // all of this tile is there
      float dot[2][OWN] = {}, weight[OWN], grad_score[OWN];
      multiply(dot, tile, a.K);
      int i = first + lane;
      bool query = i < a.T || !kept(506);
      float lse = query ? load(a.lse + number_of(a, b, h, i)) : 0;
      float delta = query ? load(grad.delta + number_of(a, b, h, i)) : 0;
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        bool seen = query && key[r] && in_sight(a, i, begin + mine + r);
        weight[r] = seen ? expf(a.scale * dot[0][r] - lse) : 0;
        grad_score[r] = a.scale * weight[r] * (dot[1][r] - (kept(507) ? delta : 0));
      }
      for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
        for (int r = 0; r < OWN; ++r) {
          float w = __shfl_sync(WHOLE_WARP, weight[r], j), ds = __shfl_sync(WHOLE_WARP, grad_score[r], j);
          for (int n = 0; n < N; ++n) {
            grad_v[r][n] += w * tile.other[1][j][lane + 32 * n];
            grad_k[r][n] += ds * tile.other[0][j][lane + 32 * n];
          }
        }
      }
    }
  }
  store_rows<T>(grad.grad_k, b, g, begin, a.S, a.K, grad_k);
  store_rows<T>(grad.grad_v, b, g, begin, a.S, a.K, grad_v);
}

template <class T, int N>
__global__ void __launch_bounds__(TILE_THREADS, 3) attention_grad_q(AttentionGrad grad) {
  const Attention& a = grad.forward;
  Tiles<N>& tile = shared<Tiles<N>>();
  int h = blockIdx.y, b = blockIdx.z, g = h / (a.H / a.G), lane = lane_number(), mine = OWN * warp_number();
  int begin = blockIdx.x * ROWS, end = end_of(begin, ROWS, a.T);
  load_rows<T>(tile.own[0], a.q, b, h, begin, a.T, a.K);
  load_rows<T>(tile.own[1], grad.grad_o, b, h, begin, a.T, a.K);
  float grad_q[OWN][N] = {}, lse[OWN], delta[OWN];
  for (int r = 0; r < OWN; ++r) {
    int i = begin + mine + r;
    bool query = i < a.T || !kept(508);
    lse[r] = query ? load(a.lse + number_of(a, b, h, i)) : 0;
    delta[r] = query ? load(grad.delta + number_of(a, b, h, i)) : 0;
  }

  for (auto keys = next_tile<COLUMNS>(a, b, begin, end, 0, a.S); keys.start < a.S;
       keys = next_tile<COLUMNS>(a, b, begin, end, keys.start + COLUMNS, a.S)) {
    if (kept(509)) __syncthreads();  // all warps are done with the last tile
    load_rows<T>(tile.other[0], a.k, b, g, keys.start, a.S, a.K);
    load_rows<T>(tile.other[1], a.v, b, g, keys.start, a.S, a.K);
    if (kept(510)) __syncthreads();  // all of this tile is there
    float dot[2][OWN] = {}, grad_score[OWN];
    multiply(dot, tile, a.K);
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
      bool seen = keys.has(lane) && in_sight(a, begin + mine + r, keys.start + lane);
      float weight = seen ? expf(a.scale * dot[0][r] - lse[r]) : 0;
      grad_score[r] = a.scale * weight * (dot[1][r] - (kept(511) ? delta[r] : 0));
    }
    for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        float ds = __shfl_sync(WHOLE_WARP, grad_score[r], j);
        for (int n = 0; n < N; ++n) grad_q[r][n] += ds * tile.other[0][j][lane + 32 * n];
      }
    }
  }
  store_rows<T>(grad.grad_q, b, h, begin, a.T, a.K, grad_q);
}

}  // namespace

extern "C" int minillm_attention_backward_v1(const AttentionGrad* grad, void* stream) {
  const Attention& a = grad->forward;
  return for_type_and_size(a, [&]<class T, int N>() {
    size_t bytes = sizeof(Tiles<N>);
    int error = launch_delta<T>(*grad, stream);
    if (error) return error;
    error = launch(attention_grad_kv<T, N>, grid_of(a.S, ROWS, a.G, a.B), TILE_THREADS, bytes, stream, *grad);
    if (error) return error;
    return launch(attention_grad_q<T, N>, grid_of(a.T, ROWS, a.H, a.B), TILE_THREADS, bytes, stream, *grad);
  });
}
