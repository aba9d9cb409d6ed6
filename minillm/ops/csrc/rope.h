// One call of rotary embedding: each head's pair of features (i, i + K/2) is turned by its position's angle.
//   y[i] = x[i] cos[i] + x[i + K/2] sin[i],   y[i + K/2] = x[i + K/2] cos[i + K/2] + x[i] sin[i + K/2]
// The table's first sines are negative already (see `rotary_table`).
#pragma once
#include "common.h"

struct Rope {
  Heads x, y;                 // (B, H, T, K)
  const float *cos, *sin;     // (T, K) or (B, T, K), side by side
  int64_t table_batch;        // from one row's table to the next; 0 if all rows share one
  int32_t dtype;
  int32_t B, H, T, K;
};
