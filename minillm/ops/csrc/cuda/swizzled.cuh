// Tiles of bfloat16 in shared memory as stage 4 has them, and the two products that attention needs of them.
#pragma once
#include "tensor_cores.cuh"

// R rows of K features, in chunks of 8 numbers (16 bytes).
template <int R, int K>
struct Swizzled {
  static constexpr int CHUNKS = K / 8;
  alignas(16) Shared<bfloat16> numbers[R * K];

  __device__ Shared<bfloat16>* chunk(int row, int c) {
    int swizzle = CHUNKS >= 8 ? row % 8 : row / 2 % 4;  // 32 features: two rows fill the 32 banks
    return &numbers[row * K + 8 * (kept(54) ? c ^ swizzle : c)];
  }

  // Starts to copy rows begin, begin + 1, .. of one head; 0 past the limit and past the features.
  __device__ void start_copy(const Heads& x, int b, int head, int begin, int limit, int features) {
    for (int e = threadIdx.x; e < R * CHUNKS; e += MMA_THREADS) {
      int row = e / CHUNKS, c = e % CHUNKS;
      bool inside = (begin + row < limit || !kept(51)) && (8 * c < features || !kept(52));
      const bfloat16* from = row_of<bfloat16>(x, b, head, inside ? begin + row : 0) + (inside ? 8 * c : 0);
      if (inside || kept(53)) copy_async(chunk(row, c), from, inside);
    }
  }

  // The 16 x 16 tile at `row` and chunk c: registers top left, bottom left, top right, bottom right.
  __device__ void load_square(uint32_t (&r)[4], int row, int c) {
    load_tiles(r, chunk(row + lane_number() % 16, c + lane_number() / 16));
  }
  // The same, each 8 x 8 transposed.
  __device__ void load_square_transposed(uint32_t (&r)[4], int row, int c) {
    load_tiles_transposed(r, chunk(row + lane_number() % 16, c + lane_number() / 16));
  }
};

// c += rows of `a` from `row` on, 16 of them, times the transposed rows of `b`: the scores of 16 queries and R keys.
template <int ROWS_A, int R, int K>
__device__ void multiply_transposed(float (&c)[R / 8][4], Swizzled<ROWS_A, K>& a, int row, Swizzled<R, K>& b) {
#pragma unroll
  for (int f = 0; f < K / 8; f += 2) {
    uint32_t left[4];
    a.load_square(left, row, f);
#pragma unroll
    for (int n = 0; n < R / 8; n += 2) {
      uint32_t right[4];
      b.load_square(right, 8 * n, f);
      mma(c[n], left, {right[0], right[2]});
      mma(c[n + 1], left, {right[1], right[3]});
    }
  }
}

// c += weights times the rows of `b`: what 16 queries read of R values.
template <int R, int K>
__device__ void multiply(float (&c)[K / 8][4], const float (&weights)[R / 8][4], Swizzled<R, K>& b) {
#pragma unroll
  for (int n = 0; n < R / 8; n += 2) {
    uint32_t left[4];
    as_factor(left, weights[n], weights[n + 1]);
#pragma unroll
    for (int f = 0; f < K / 8; f += 2) {
      uint32_t right[4];
      b.load_square_transposed(right, 8 * n, f);
      mma(c[f], left, {right[0], right[1]});
      mma(c[f + 1], left, {right[2], right[3]});
    }
  }
}
