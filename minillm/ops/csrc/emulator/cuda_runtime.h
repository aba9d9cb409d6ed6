// Stands where CUDA's header of this name would: with this folder first in the include path, g++ compiles the .cu files
// and the emulated GPU of machine.h and what is built on it run them. Here are the words of CUDA that our kernels use.
#pragma once
#include <cassert>
#include <cmath>
#include <cstdint>

#include "cuda_bf16.h"
#include "products.h"

#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // unroll

#undef assert  // a GPU's ends the kernel, not the program
#define assert(claim) \
  ((claim) ? void() : emulator::machine.fail("assertion failed at %s:%d: %s", __FILE__, __LINE__, #claim))

#define __global__ static
#define __device__
#define __host__
#define __forceinline__
#define __launch_bounds__(...)

template <class T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#pragma GCC visibility push(hidden)

#define MINILLM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MINILLM_PLACE) { emulator::machine.barrier({file, line}); }
inline void __syncwarp(MINILLM_PLACE) { emulator::machine.meet_warp({file, line}, true); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, MINILLM_PLACE) {
  ++emulator::machine.counts.shuffles;
  return emulator::machine.show(value, {file, line})[lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int other, MINILLM_PLACE) {
  ++emulator::machine.counts.shuffles;
  return emulator::machine.show(value, {file, line})[emulator::machine.self().lane ^ other];
}
inline unsigned __ballot_sync(unsigned, bool value, MINILLM_PLACE) {
  ++emulator::machine.counts.shuffles;
  auto shown = emulator::machine.show(value, {file, line});
  unsigned bits = 0;
  for (int lane = 0; lane < emulator::WARP; ++lane) bits |= unsigned{shown[lane]} << lane;
  return bits;
}
inline bool __any_sync(unsigned lanes, bool value, MINILLM_PLACE) {
  return __ballot_sync(lanes, value, file, line) != 0;
}

// How Python (minillm/ops/emulate.py) sets the machine up and reads it.
#define MINILLM_EXPORT extern "C" inline __attribute__((used, visibility("default")))
MINILLM_EXPORT void emulator_configure(int schedule, unsigned seed, int mutant, int traced_block) {
  emulator::machine.reset();
  emulator::machine.schedule = schedule, emulator::machine.seed = seed;
  emulator::machine.mutant = mutant, emulator::machine.traced_block = traced_block;
}
MINILLM_EXPORT void emulator_region(const char* begin, int64_t bytes) {
  emulator::machine.regions.push_back({begin, begin + bytes, {}});
}
MINILLM_EXPORT const char* emulator_error() { return emulator::machine.error.c_str(); }
MINILLM_EXPORT const char* emulator_trace() { return emulator::machine.trace.c_str(); }
MINILLM_EXPORT const emulator::Counts* emulator_counts() { return &emulator::machine.counts; }
MINILLM_EXPORT bool emulator_reached_mutant() { return emulator::machine.mutant_reached; }

#pragma GCC visibility pop
