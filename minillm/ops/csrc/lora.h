// Many low-rank adapters in one batch (see ops/lora_gather.py). Row i of the batch has the adapter n = rows[i]:
//   u = x[i] A[n]^T (T, R),  out[i] = y[i] + scale[n] u B[n]^T;  where n is -1, out[i] = y[i]
// Shape letters: B rows, T positions, N adapters, R rank; an adapter of a lower rank is padded with zeros, or `ranks`
// says how many of its R there are.
#pragma once
#include "common.h"

struct Rows {  // (B, T, features); the features lie side by side
  void* data;
  int64_t batch, row;  // strides, in elements
};

struct Factors {  // (N, R, features): A as it is, B with Dout side by side
  const void* data;
  int64_t adapter, rank;
};

struct LoraGather {
  Rows x, y, out;         // (B, T, Din), (B, T, Dout), (B, T, Dout), all of one type; y without data is zeros
  Factors a, b;           // (N, R, Din), (N, R, Dout)
  float* u;               // (B, T, R) side by side; kept for the backward
  const int64_t* rows;    // (B) numbers of adapters, or null: row i has adapter i
  const int64_t* ranks;   // (N), or null: all R
  const float* scale;     // (N), or null: 1
  int32_t dtype, factor_dtype;
  int32_t B, T, N, R, Din, Dout;
};

// The gradients for `grad`, that of out; `forward.y` and `forward.out` are not used. v = grad B[n] stands for u:
//   grad_x = scale v A,  grad_a[n] = scale * sum of v^T x,  grad_b[n] = scale * sum of u^T grad
//   grad_scale[n] = sum of u v
struct LoraGatherGrad {
  LoraGather forward;
  Rows grad, grad_x;         // (B, T, Dout), (B, T, Din); grad_x without data is not wanted
  void *grad_a, *grad_b;     // (N, R, Din), (N, R, Dout) side by side, of factor_dtype; null if not wanted
  float *grad_scale, *v;     // (N); (B, T, R)
};
