// One call of RMS normalisation: each row of D features is divided by its root mean square, then multiplied by weight.
#pragma once
#include "common.h"

struct RmsNorm {
  const void *x, *weight;  // (rows, D) side by side, (D)
  void* y;                 // (rows, D)
  int64_t rows;
  int32_t dtype, D;
  float eps;
};
