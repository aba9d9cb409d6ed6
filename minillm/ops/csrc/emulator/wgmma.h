// A product of Hopper's tensor cores, from the moment four warps start it to the moment they wait for it.
#pragma once
#include <memory>
#include <vector>

#include "cuda_bf16.h"
#include "tensor_map.h"

namespace emulator {

constexpr int GROUP_ROWS = 64, STEPS = 16;  // of a product: rows, and numbers that one sum is over

// Where a factor lies in shared memory. Bits 0-13 the address, 16-29 the leading and 32-45 the stride byte offset, each
// without its last four bits; 49-51 the base offset; 62-63 the swizzle: none, 128, 64 or 32 bytes.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format".
struct Descriptor {
  uint32_t start, leading, stride, base;
  int span;
  explicit Descriptor(uint64_t bits = 0) {
    start = bits << 4 & 0x3ffff, leading = bits >> 16 << 4 & 0x3ffff, stride = bits >> 32 << 4 & 0x3ffff;
    base = bits >> 49 & 7;
    constexpr int SPANS[] = {0, 128, 64, 32};
    span = SPANS[bits >> 62];
  }

  // Address of the number in row `row` of A (or column of B), step k of the sum. Not transposed: a row's steps are
  // neighbours. Transposed: a step's rows are.
  // Source: the canonical layouts of CUTLASS, cute/atom/mma_traits_sm90_gmma.hpp, make_gmma_desc, in units of 16 bytes
  // (W = span / 16):  ((8,n),2):((1,SBO),LBO)  and with a swizzle ((8,n),2):((W,SBO),1);
  //     transposed  ((1,n),(8,k)):((X,SBO),(1,LBO))  and with a swizzle ((W,n),(8,k)):((1,LBO),(W,SBO)).
  uint32_t address(int row, int k, bool transposed) const {
    uint32_t at;
    if (!transposed) {
      int pitch = span ? span : CHUNK;
      at = row % 8 * pitch + row / 8 * stride + k / 8 * (span ? CHUNK : leading) + k % 8 * 2;
    } else if (!span) {
      at = row % 8 * 2 + row / 8 * stride + k % 8 * CHUNK + k / 8 * leading;
    } else {
      int wide = span / 2;
      at = row % wide * 2 + row / wide * leading + k % 8 * span + k / 8 * stride;
    }
    return swizzled(start + at, span);
  }

  // What this cannot be, or null.
  const char* refusal() const {
    if (base) return "a base offset of 0 (others are not emulated)";
    if (span && start / 128 % (span / 16)) return "a start in the first row of the swizzle's pattern";
    return nullptr;
  }
};

struct Product {
  int columns;
  bool a_in_registers, b_transposed;
  uint64_t a_bits, b_bits;
  float a[GROUP_ROWS][STEPS];
  std::vector<float> b;   // (columns, STEPS); empty until the factors are read: late, by the first thread that waits
  bool readable = false;  // they lie where a product may read

  // The part of factor a that one thread holds: of its warp's 16 rows g and g + 8, columns 2t, 2t + 1 and the same + 8.
  void take_registers(const uint32_t* registers, int thread) {
    int row = thread / 32 % 4 * 16 + thread % 32 / 4, t = thread % 4 * 2;
    for (int e = 0; e < 8; ++e) {
      a[row + e / 2 % 2 * 8][t + e % 2 + e / 4 * 8] =
          __bfloat162float({static_cast<uint16_t>(registers[e / 2] >> (e % 2 * 16))});
    }
  }

  template <class NumberAt>
  void read_factors(NumberAt number_at) {
    Descriptor of_a(a_bits), of_b(b_bits);
    b.resize(columns * STEPS);
    for (int k = 0; k < STEPS; ++k) {
      for (int row = 0; row < GROUP_ROWS && !a_in_registers; ++row) a[row][k] = number_at(of_a.address(row, k, false));
      for (int n = 0; n < columns; ++n) b[n * STEPS + k] = number_at(of_b.address(n, k, b_transposed));
    }
  }

  // The part of one thread: rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of each 8.
  void add_to(float* d, int thread) const {
    if (b.empty()) return;
    int row = thread / 32 % 4 * 16 + thread % 32 / 4, t = thread % 4 * 2;
    for (int e = 0; e < columns / 2; ++e) {
      const float* left = a[row + e % 4 / 2 * 8];
      const float* right = &b[(e / 4 * 8 + t + e % 2) * STEPS];
      for (int k = 0; k < STEPS; ++k) d[e] += left[k] * right[k];
    }
  }
};

struct Underway {  // a product, for one of its threads
  std::shared_ptr<Product> product;
  uint32_t group;
  float* d;
  bool add;                   // to what d held
  std::vector<float> before;  // that, or the sum of the products before this one
};

struct Products {  // of one thread
  std::vector<Underway> under_way;
  uint32_t groups = 0;  // committed
  bool fenced = false;  // since the thread could last touch registers
};

}  // namespace emulator
