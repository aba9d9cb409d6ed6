// One call of attention, the same for every kernel: on the CPU, on a GPU, and on the emulated GPU.
// Shape letters: B batch, T queries, S keys, H query heads, G key/value heads (G divides H), K features of a head.
#pragma once
#include "common.h"

// Query i (of T, the newest positions) may see key j (of S)  <=>
//   keys is null, or keys[b][j] is not 0                      padding, on either side or within
//   and (not causal, or j <= i + S - T)
//   and (window is 0, or j < prefix, or j > i + S - T - window)   the newest `window` keys, and a learned prefix
// A query that sees nothing reads 0, and its lse is -infinity.
struct Attention {
  Heads q, k, v, o;     // (B, H, T, K), (B, G, S, K), (B, G, S, K), (B, H, T, K)
  float* lse;           // (B, H, T) side by side: log of the sum of exp(scale q.k) over the keys seen
  const uint8_t* keys;  // (B, S), or null
  int64_t keys_batch;   // from one row of `keys` to the next; 0 if all rows share one
  int32_t dtype;        // of q, k, v, o
  int32_t B, H, G, T, S, K;
  int32_t causal, window, prefix;
  float scale;
};

// The gradients of `forward` for grad_o. delta (B, H, T) is room for the sums over K of grad_o * o.
struct AttentionGrad {
  Attention forward;
  Heads grad_o, grad_q, grad_k, grad_v;
  float* delta;
};
