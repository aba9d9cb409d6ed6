// What all stages of multi-adapter LoRA share: its three thin products, and where their numbers lie.
//
//   Shrink  u = x A^T                  forward; and v = grad B of the backward pass
//   Expand  out = y + scale u B        forward; and grad_x = scale v A
//   Sum     grad_a = scale v^T x       and grad_b = scale u^T grad: a sum over the rows of each adapter
//
// A product is "thin" when one of its sizes is the rank, 8 or 64 where the others are thousands: each number read takes
// part in few multiplications, and the time is that of reading. One adapter for all is a batch of one row: so the same
// kernels serve lora_linear.cu.
#pragma once
#include <cassert>

#include "dropout.cuh"
#include "global.cuh"
#include "lora.h"

constexpr int INVALID = 1;  // cudaErrorInvalidValue: this stage does not take this shape

struct Factor {  // N matrices of R rows; in A and B of lora.h the features lie side by side
  const void* data;
  int64_t adapter, rank, feature;
};

struct Thin {  // whose row has which adapter
  const int64_t *rows, *ranks;
  const float* scale;  // (N), or null: `one_scale`
  float one_scale;
  int32_t dtype, factor_dtype, B, T, N, R;
};

struct Shrink {
  Thin thin;
  Rows x;
  Factor a;
  float* u;
  int32_t width;  // features of x
  Dropout dropout;
};

struct Expand {
  Thin thin;
  Rows y, out;
  Factor b;
  const float* u;
  int32_t width;  // features of out
  Dropout dropout;
};

struct Sum {
  Thin thin;
  const float* u;
  Rows x;
  Factor out;   // of factor_dtype
  float* room;  // (parts, N, R, width): the positions are cut into `parts`, which are then added; null: one part
  int32_t width, parts;
  Dropout dropout;
};

// A stage of each; a cudaError.
int lora_shrink_v1(const Shrink&, void* stream);
int lora_shrink_v2(const Shrink&, void* stream);
int lora_shrink_v3(const Shrink&, void* stream);
int lora_shrink_v4(const Shrink&, void* stream);
int lora_expand_v1(const Expand&, void* stream);
int lora_expand_v2(const Expand&, void* stream);
int lora_expand_v3(const Expand&, void* stream);
int lora_expand_v4(const Expand&, void* stream);
int lora_sum_v1(const Sum&, void* stream);
int lora_sum_v2(const Sum&, void* stream);
// Stage 1 to 4, or for 0 the one that is fastest for this shape.
int lora_shrink(const Shrink&, int stage, void* stream);
int lora_expand(const Expand&, int stage, void* stream);
int lora_sum(const Sum&, int stage, void* stream);  // 1 to 3: its first, 4: its second

struct Adapter {
  int64_t number;
  int rank;  // 0 for a row without adapter
  float scale;
};

inline __device__ Adapter describe(const Thin& thin, int64_t n) {
  if (n < 0 && kept(1111)) return {0, 0, 0};
  int64_t rank = thin.ranks ? fetch(thin.ranks + n) : thin.R;
  return {n, static_cast<int>(rank), thin.scale ? load(thin.scale + n) : thin.one_scale};
}
inline __device__ Adapter adapter_of(const Thin& thin, int b) {
  int64_t n = thin.rows ? fetch(thin.rows + b) : b;
  assert(n >= -1 && n < thin.N);  // nobody looked before: a GPU would have to be waited for
  return describe(thin, n);
}

template <class T>
__device__ T* row_of(const Rows& x, int b, int t) {
  return static_cast<T*>(x.data) + b * x.batch + t * x.row;
}
template <class F>
__device__ F* row_of(const Factor& a, int64_t n, int r) {
  return static_cast<F*>(const_cast<void*>(a.data)) + n * a.adapter + r * a.rank;
}
inline __device__ int64_t number_of(const Thin& thin, int b, int t) { return int64_t{b} * thin.T + t; }

inline bool sound(const Thin& thin) {
  bool types = thin.factor_dtype == FLOAT32 || (thin.dtype == BFLOAT16 && thin.factor_dtype == BFLOAT16);
  return types && (thin.dtype == FLOAT32 || thin.dtype == BFLOAT16) && thin.B <= 65535 && thin.R > 0;
}
inline bool sound(const Dropout& dropout) { return dropout.p >= 0 && dropout.p < 1; }

inline unsigned parts_of(int64_t limit, int size) { return (limit + size - 1) / size; }

// Calls f.template operator()<X, F>() for the types of the rows and of the factors.
template <class F>
int for_types(const Thin& thin, F f) {
  if (!sound(thin)) return INVALID;
  if (thin.dtype == FLOAT32) return f.template operator()<float, float>();
  if (thin.factor_dtype == FLOAT32) return f.template operator()<bfloat16, float>();
  return f.template operator()<bfloat16, bfloat16>();
}
