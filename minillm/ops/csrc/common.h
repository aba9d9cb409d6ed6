// What all kernels share: how a tensor of heads lies in memory, its number types, and how work is spread over threads.
// No kernel includes a header of torch: it gets plain pointers, sizes and strides, and compiles in a second.
#pragma once
#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A tensor (B, heads, rows, features). The strides count elements; the features lie side by side.
struct Heads {
  void* data;
  int64_t batch, head, row;
};
