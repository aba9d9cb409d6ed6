// One call of a low-rank update for training: the library multiplies the frozen weight, and the thin products add to
// its result. With drop(x) = x where a number is kept, over 1 - dropout, and 0 where it is not:
//   u = drop(x) A^T,  out = y + scale u B^T
// Which numbers are kept is computed from the seed, alike in the forward and the backward pass (ops/dropout.py).
#pragma once
#include "common.h"

struct LoraLinear {
  const void *x, *y;                           // (M, Din); (M, Dout), of the type of x: x W^T + bias; may be `out`
  void* out;                                   // (M, Dout)
  float* u;                                    // (M, R) side by side; kept for the backward
  const void *a, *b;                           // (R, Din), (Dout, R)
  int64_t x_row, y_row, out_row, a_row, b_row; // elements from one row to the next; within a row they lie side by side
  int32_t dtype, factor_dtype;
  int32_t M, Din, Dout, R;
  float scale, dropout;                        // 0 <= dropout < 1
  uint32_t seed[2];                            // its lower and its upper half
};

// The gradients for `grad`, that of out; `forward.y` and `forward.out` are not used. v = grad B:
//   grad_x = base + scale drop(v A),  grad_a = scale v^T drop(x),  grad_b = scale grad^T u
struct LoraLinearGrad {
  LoraLinear forward;
  const void *grad, *base;            // (M, Dout); (M, Din): grad W, or null for 0; may be `grad_x`
  void* grad_x;                       // (M, Din), null if not wanted
  int64_t grad_row, base_row, grad_x_row;
  void *grad_a, *grad_b;              // (R, Din), (Dout, R) side by side, of factor_dtype; null if not wanted
  float *v, *room;                    // (M, R); (parts, R, the larger of Din and Dout), or null where parts is 1
  int32_t parts;                      // of the M rows, summed side by side: the same number gives the same bits
};
