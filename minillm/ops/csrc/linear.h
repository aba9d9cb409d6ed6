// One call of a linear layer for few rows: y = x W^T + bias, in each row m and output o
//   y[m][o] = bias[o] + sum over i of x[m][i] W[o][i]
// and, with a low-rank update of rank R > 0, + scale * sum over r of B[o][r] (sum over i of A[r][i] x[m][i]).
#pragma once
#include "common.h"

struct Linear {
  const void *x, *weight, *bias;     // (M, Din), (Dout, Din), (Dout) or null; all of one type
  void* y;                           // (M, Dout)
  int64_t x_row, weight_row, y_row;  // elements from one row to the next; within a row they lie side by side
  const void *a, *b;                 // (R, Din), (Dout, R)
  int64_t a_row, b_row;
  int32_t dtype, factor_dtype;  // the second: of a and b
  int32_t M, Din, Dout, R;      // M: 1 .. 4
  float scale;
};
