// The copy engine's view of a tensor, as cuTensorMapEncodeTiled makes it: its rules, and where each part of a box goes.
#pragma once
#include <algorithm>
#include <cstdint>

namespace emulator {

constexpr int MAX_RANK = 5, MAX_BOX = 256, CHUNK = 16;

// The chunks (16 bytes) of a row change places within `span` bytes: 128, 64 or 32, or 0 for none. Bits 4 to 6 of an
// address are flipped by bits 7 to 9; of the smaller spans two bits or one. The same holds for the copy engine and for
// the tensor cores, and for addresses, so the pattern begins where they are a multiple of 8 x span.
// Source: PTX ISA, "Swizzling modes"; CUTLASS's Swizzle<3,4,3>, Swizzle<2,4,3> and Swizzle<1,4,3>.
inline uint32_t swizzled(uint32_t address, int span) {
  return span ? address ^ (address >> 3 & (span - CHUNK)) : address;
}

struct TensorMap {
  char* data;
  int rank, element_bytes, span;
  uint64_t size[MAX_RANK], stride[MAX_RANK];  // stride: bytes; that of the first dimension is element_bytes
  uint32_t box[MAX_RANK];

  int64_t box_bytes() const {
    int64_t bytes = element_bytes;
    for (int d = 0; d < rank; ++d) bytes *= box[d];
    return bytes;
  }

  // What the driver would refuse, or null. Source: cuda.h, the page of cuTensorMapEncodeTiled (without interleaving).
  const char* refusal() const {
    uint64_t inner = uint64_t{box[0]} * element_bytes;
    if (rank < 1 || rank > MAX_RANK) return "a rank of 1 to 5";
    if (reinterpret_cast<uintptr_t>(data) % CHUNK) return "an address that is a multiple of 16";
    if (inner % CHUNK) return "boxes with rows of a multiple of 16 bytes";
    if (span && inner > uint64_t(span)) return "boxes with rows no longer than the swizzle's span";
    for (int d = 0; d < rank; ++d) {
      if (size[d] == 0 || size[d] > uint64_t{1} << 32) return "sizes of 1 to 2^32";
      if (box[d] == 0 || box[d] > MAX_BOX) return "boxes of 1 to 256 in each dimension";
      if (d && (stride[d] % CHUNK || stride[d] >> 40)) return "strides that are a multiple of 16 and less than 2^40";
    }
    return nullptr;
  }

  // Calls visit(to, from, begin, end) for each 16 bytes of the box whose first element is at `start`. They go to `to`
  // bytes behind the address `place` in shared memory; bytes begin to end - 1 of them are the tensor's, at `from`.
  template <class Visit>
  void each_chunk(const int64_t (&start)[MAX_RANK], uint32_t place, Visit visit) const {
    int64_t at[MAX_RANK] = {}, elements = CHUNK / element_bytes;
    for (uint32_t to = 0; to < box_bytes(); to += CHUNK) {
      int64_t column = start[0] + at[0], row = column * element_bytes;
      int64_t begin = std::clamp<int64_t>(-column, 0, elements) * element_bytes;
      int64_t end = std::clamp<int64_t>(int64_t(size[0]) - column, 0, elements) * element_bytes;
      for (int d = 1; d < rank; ++d) {
        int64_t index = start[d] + at[d];
        row += index * int64_t(stride[d]);
        if (index < 0 || index >= int64_t(size[d])) end = begin;
      }
      visit(swizzled(place + to, span) - place, data + row + begin, begin, end);
      at[0] += elements;
      for (int d = 0; d + 1 < rank && at[d] >= box[d]; ++d) at[d] = 0, ++at[d + 1];
    }
  }
};

}  // namespace emulator
