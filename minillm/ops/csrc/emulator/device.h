// The emulated half of cuda/device.cuh: what a kernel does to memory and with tensor cores, watched and counted.
#pragma once
#include "cuda_runtime.h"

#pragma GCC visibility push(hidden)

using bfloat16 = __nv_bfloat16;
using emulator::machine;

inline bool kept(int mutant) {
  if (machine.mutant != mutant) return true;
  machine.mutant_reached = true;
  return false;
}

// An element of shared memory: reading it and assigning to it are noted.
template <class T>
class __attribute__((visibility("default"))) Shared {
  static_assert(sizeof(T) >= 2, "the emulated GPU watches shared memory two bytes at a time: let no thread write one");

 public:
  operator T() const { return machine.touch(&value_, sizeof(T), false) ? value_ : T{}; }
  Shared& operator=(T value) {
    if (machine.touch(&value_, sizeof(T), true)) value_ = value;
    return *this;
  }
  Shared& operator=(const Shared& other) { return *this = static_cast<T>(other); }

 private:
  T value_;
};

template <class T>
T& shared() {
  return *reinterpret_cast<T*>(machine.shared());
}

// Any plain type, whole. What must not be read is all ones: of a floating point number, NaN.
template <class T>
T fetch(const T* from) {
  T value;
  std::memset(&value, 0xff, sizeof(T));
  if (machine.reach(from, sizeof(T), false)) std::memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
void put(T* to, T value) {
  if (machine.reach(to, sizeof(T), true)) std::memcpy(to, &value, sizeof(T));
}
template <class T>
T atomicAdd(T* to, T value) {
  bool there = machine.reach(to, sizeof(T), false, true) && machine.reach(to, sizeof(T), true, true);
  if (!there) return value;
  T before = *to;
  *to = before + value;
  return before;
}
template <class T>
T atomicAdd(Shared<T>*, T) {
  static_assert(!sizeof(T), "the emulated GPU knows atomics of global memory alone");
}

inline float load(const float* from) { return fetch(from); }
inline float load(const bfloat16* from) { return __bfloat162float(fetch(from)); }
inline bool load(const uint8_t* from) { return fetch(from); }
inline uint4 load16(const void* from) { return fetch(static_cast<const uint4*>(from)); }
inline void store(float* to, float value) { put(to, value); }
inline void store(bfloat16* to, float value) { put(to, __float2bfloat16(value)); }
inline void store_pair(bfloat16* to, uint32_t pair) { put(reinterpret_cast<uint32_t*>(to), pair); }
inline void store16(Shared<bfloat16>* to, uint4 value) {
  if (machine.touch(to, 16, true)) std::memcpy(static_cast<void*>(to), &value, 16);
}
inline float multiply_then_add(float a, float b, float c) { return a * b + c; }

inline uint32_t pack(float low, float high) {
  return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}
inline uint32_t pack(bfloat16 low, bfloat16 high) { return low.bits | uint32_t{high.bits} << 16; }
inline uint32_t load_pair(const Shared<bfloat16>* from) {
  uint32_t pair = ~0u;
  if (machine.touch(from, 4, false)) std::memcpy(&pair, static_cast<const void*>(from), 4);
  return pair;
}

inline void copy_async(Shared<bfloat16>* to, const bfloat16* from, bool inside) {
  machine.copy_later(reinterpret_cast<char*>(to), inside ? reinterpret_cast<const char*>(from) : nullptr);
}
inline void commit_copies() { ++machine.self().group; }
template <int STILL_UNDER_WAY>
void wait_for_copies() {
  machine.land_copies(STILL_UNDER_WAY);
}

namespace emulator {
inline float half_of(uint32_t pair, int high) {
  return __bfloat162float({static_cast<uint16_t>(high ? pair >> 16 : pair)});
}
}  // namespace emulator

// c += a b for tiles 16 x 16, 16 x 8, in the layout of PTX's mma.m16n8k16 (ISA 9.7.14.5.8): of each tile, the lane
// 4 g + t holds rows g and g + 8 of `a` and `c`, columns 2t, 2t + 1 (and + 8), and of `b` column g, rows likewise.
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MINILLM_PLACE) {
  struct Registers {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  auto warp = machine.show(mine, {file, line});
  int lane = machine.self().lane, g = lane / 4, t = lane % 4;
  if (lane == 0) ++machine.counts.mma;
  for (int pair = 0; pair < 4; ++pair) {          // columns 4 pair.. of `a`: lanes 4g..4g+3 hold two columns each
    Registers of_a = warp[4 * g + pair], left = warp[4 * (2 * t) + pair], right = warp[4 * (2 * t + 1) + pair];
    for (int upper = 0; upper < 2; ++upper) {     // columns and rows 8 to 15
      for (int odd = 0; odd < 2; ++odd) {
        float top = emulator::half_of(of_a.a[2 * upper], odd), bottom = emulator::half_of(of_a.a[2 * upper + 1], odd);
        float b_left = emulator::half_of(left.b[upper], odd), b_right = emulator::half_of(right.b[upper], odd);
        c[0] += top * b_left, c[1] += top * b_right, c[2] += bottom * b_left, c[3] += bottom * b_right;
      }
    }
  }
}

namespace emulator {
// Eight rows of 16 bytes are read at once if no two lie in the same of the eight columns of 16 bytes that make the
// banks.
inline void count_conflicts(const Shown<const Shared<bfloat16>*>& rows) {
  for (int first = 0; first < WARP; first += 8) {
    int most = 1, in_column[8] = {};
    for (int row = first; row < first + 8; ++row) {
      most = max(most, ++in_column[reinterpret_cast<uintptr_t>(rows[row]) / 16 % 8]);
    }
    machine.counts.conflicts += most - 1;
  }
}
}  // namespace emulator

// Four 8 x 8 tiles: lane i gives the address of row i % 8 of tile i / 8; lane 4 g + t gets row g, columns 2t, 2t + 1.
inline void load_tiles(uint32_t (&r)[4], const Shared<bfloat16>* row, MINILLM_PLACE) {
  auto rows = machine.show(row, {file, line});
  machine.check_aligned(row);
  int lane = machine.self().lane;
  if (lane == 0) emulator::count_conflicts(rows);
  for (int tile = 0; tile < 4; ++tile) r[tile] = load_pair(rows[8 * tile + lane / 4] + 2 * (lane % 4));
}
// The same of the transposed tiles: lane 4 g + t gets column g, rows 2t, 2t + 1.
inline void load_tiles_transposed(uint32_t (&r)[4], const Shared<bfloat16>* row, MINILLM_PLACE) {
  auto rows = machine.show(row, {file, line});
  machine.check_aligned(row);
  int lane = machine.self().lane, t = lane % 4;
  if (lane == 0) emulator::count_conflicts(rows);
  for (int tile = 0; tile < 4; ++tile) {
    r[tile] = pack(static_cast<bfloat16>(rows[8 * tile + 2 * t][lane / 4]),
                   static_cast<bfloat16>(rows[8 * tile + 2 * t + 1][lane / 4]));
  }
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void*, Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  auto run = [](const void* context) { (*static_cast<const decltype(call)*>(context))(); };
  return machine.run(grid, threads, shared_bytes, run, &call);
}

#pragma GCC visibility pop
