// The few things of a GPU that C++ has no word for. nvcc reads this page; g++ reads emulator/device.h instead, where
// each of them is watched and counted, so that the same kernels run without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include "emulator/device.h"
#else

using bfloat16 = __nv_bfloat16;

// True, except on the emulated GPU where mutant `number` is on trial: then what `kept` guards is left out, and a test
// must notice (MUTANTS.md).
constexpr __device__ bool kept(int number) { return true; }

// An element of the memory that the threads of a block share.
template <class T>
using Shared = T;

// That memory, seen as a T. It holds NaN or worse until written.
template <class T>
__device__ T& shared() {
  extern __shared__ __align__(128) unsigned char minillm_shared[];
  return *reinterpret_cast<T*>(minillm_shared);
}

// Every access of global memory goes through these, so that it can be counted: numbers as floats, or any plain type
// whole.
inline __device__ float load(const float* from) { return *from; }
inline __device__ float load(const bfloat16* from) { return __bfloat162float(*from); }
inline __device__ bool load(const uint8_t* from) { return *from; }
inline __device__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
inline __device__ void store(float* to, float value) { *to = value; }
inline __device__ void store(bfloat16* to, float value) { *to = __float2bfloat16(value); }
inline __device__ void store_pair(bfloat16* to, uint32_t pair) { *reinterpret_cast<uint32_t*>(to) = pair; }
template <class T>
__device__ T fetch(const T* from) {
  return *from;
}
template <class T>
__device__ void put(T* to, T value) {
  *to = value;
}
inline __device__ void store16(bfloat16* to, uint4 value) { *reinterpret_cast<uint4*>(to) = value; }  // shared memory

// Rounded after the product and after the sum, as PyTorch does it; nvcc would make one rounding of a * b + c.
inline __device__ float multiply_then_add(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); }

// Two neighbouring bfloat16 in one register, as tensor cores want them.
inline __device__ uint32_t pack(bfloat16 low, bfloat16 high) {
  return __bfloat16_as_ushort(low) | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
inline __device__ uint32_t pack(float low, float high) { return pack(__float2bfloat16(low), __float2bfloat16(high)); }
inline __device__ uint32_t load_pair(const bfloat16* from) { return *reinterpret_cast<const uint32_t*>(from); }

// Copies of 16 bytes from global to shared memory that go on while the thread computes: start some, commit them as a
// group, and wait until at most so many groups are still under way. What is not `inside` becomes 0.
inline __device__ void copy_async(bfloat16* to, const bfloat16* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int STILL_UNDER_WAY>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STILL_UNDER_WAY) : "memory");
}

// c += a b on the tensor cores, for tiles 16 x 16 and 16 x 8 spread over a warp: of each, lane 4 g + t holds
//   a: rows g and g + 8, columns 2t, 2t + 1 and the same + 8   (a[0] top left, a[1] bottom left, a[2] top right, a[3])
//   b: column g, rows 2t, 2t + 1 and the same + 8              (b[0] above, b[1] below)
//   c: rows g and g + 8, columns 2t, 2t + 1                    (c[0], c[1] top, c[2], c[3] bottom)
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
inline __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 tiles from shared memory in one instruction (ldmatrix). Lane i gives the address of row i % 8 of tile i /
// 8; lane 4 g + t gets row g, columns 2t and 2t + 1 of each tile; transposed: column g, rows 2t and 2t + 1.
inline __device__ void load_tiles(uint32_t (&r)[4], const bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
inline __device__ void load_tiles_transposed(uint32_t (&r)[4], const bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// kernel<<<grid, threads, ...>>>(arguments...), with the right to more than 48 KB of shared memory. Returns a
// cudaError.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;  // nothing to do
  if (shared_bytes > 48 * 1024) {
    auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (allowed != cudaSuccess) return allowed;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

#endif

constexpr unsigned WHOLE_WARP = ~0u;
inline __device__ int lane_number() { return threadIdx.x % 32; }
inline __device__ int warp_number() { return threadIdx.x / 32; }

// The largest and the sum of one value of each lane, told to all lanes: five exchanges, each with twice as far a lane.
inline __device__ float warp_max(float value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
  }
  return value;
}
inline __device__ float warp_sum(float value) {
  for (int distance = 1; distance < 32; distance *= 2) value += __shfl_xor_sync(WHOLE_WARP, value, distance);
  return value;
}
