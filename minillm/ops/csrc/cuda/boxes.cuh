// Tiles of bfloat16 in shared memory as stage 5 has them: brought by the copy engine, read by the tensor cores.
#pragma once
#include "hopper.cuh"
#include "tensor_cores.cuh"

constexpr int BOX = SWIZZLE_SPAN / 2;  // features of one copy: the swizzle allows rows of 128 bytes

// R rows of K features, as K / 64 boxes one after the other. R is a multiple of 8, K of 64.
template <int R, int K>
struct Boxes {
  static constexpr int BYTES = R * K * 2;
  Shared<bfloat16> numbers[K / BOX][R][BOX];

  // Starts to copy rows begin, begin + 1, .. of one head; 0 past the last row and past the features. One thread asks.
  __device__ void start_copy(const TensorMap& map, int b, int head, int begin, Mbarrier& landed) {
    for (int c = 0; c < K / BOX; ++c) copy_box(numbers[c][0], map, BOX * c, begin, head, b, landed);
  }

  // Rows `row`, row + 1, .. as a factor: their features from f to f + 15 are summed over.
  __device__ uint64_t rows(int row, int f) const {
    return descriptor(&numbers[f / BOX][row][f % BOX], 16, kept(81) ? SWIZZLE_REPEAT : SWIZZLE_SPAN);
  }
  // Rows `row` to row + 15 as a factor that has its columns side by side: the rows are summed over.
  __device__ uint64_t columns(int row) const {
    return descriptor(numbers[0][row], kept(82) ? R * SWIZZLE_SPAN : SWIZZLE_REPEAT,
                      kept(83) ? SWIZZLE_REPEAT : SWIZZLE_SPAN);
  }
};

// The map of a tensor of heads whose copies take `rows` rows at a time. Returns a cudaError: INVALID where the copy
// engine cannot step from row to row, or from head to head (strides of 0 among them, which no manual promises).
inline int encode(TensorMap& map, const Heads& x, int features, int64_t rows, int64_t heads, int64_t batch,
                  uint32_t rows_of_box) {
  uint64_t size[4] = {uint64_t(features), uint64_t(rows), uint64_t(heads), uint64_t(batch)};
  uint64_t stride[3] = {uint64_t(x.row) * 2, uint64_t(x.head) * 2, uint64_t(x.batch) * 2};
  for (int d = 0; d < 3; ++d) {
    if (size[d + 1] == 1) stride[d] = uint64_t(features) * 2;  // no step is taken, whatever the tensor says
    if (stride[d] == 0 || stride[d] % 16 || stride[d] >> 40) return INVALID;
  }
  return encode(map, x.data, size, stride, {uint32_t(BOX), rows_of_box, 1, 1});
}
