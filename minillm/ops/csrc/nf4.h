// Weights in NF4 (see ops/quantize.py): 4-bit codes of a book of 16 values, and one scale for each block of weights of
// the flattened matrix. Weight i is book[code i] * scale[i / block]. Weights in whole numbers of 4 bits (ops/int4.py)
// are the same with a book of 0 .. 15 and a zero for each block: (book[code i] - zero[i / block]) * scale[i / block].
#pragma once
#include "common.h"

struct Nf4 {
  const uint8_t* codes;   // two a byte, the first in the high four bits
  const void* absmax;     // (blocks): the scales as floats, or bytes where absmax2 is given:
  const float* absmax2;   // (blocks / 256, up), or null. scale[b] = book8[absmax[b]] * absmax2[b / 256] + *offset
  const float *offset, *book8;
  const float* book;      // (256, 2): both values of each byte
  const float* zero;      // (blocks), or null: all 0
  int64_t count;          // of weights
  int32_t block;          // even
};

struct Nf4Quantize {
  const void* weight;  // side by side
  uint8_t* codes;      // (blocks, block / 2)
  float* absmax;       // (blocks)
  const float* book;
  int64_t count;
  int32_t dtype, block;
};

struct Nf4Dequantize {
  Nf4 weight;
  void* out;  // (count)
  int32_t dtype;
};

// y = x W^T + bias
struct Nf4Linear {
  Nf4 weight;             // (Dout, Din)
  const void *x, *bias;   // (M, Din), (Dout) or null, of one type
  void* y;                // (M, Dout)
  int64_t x_row, y_row;
  int32_t dtype, M, Din, Dout;
};
