// What Hopper (sm_90a) adds to device.cuh: copies of whole tiles by an engine of their own (TMA), barriers in shared
// memory that such copies complete (mbarrier), and products by four warps that read their tiles where they lie (wgmma).
//
// All three run beside the threads that start them, so each has its own way to be waited for:
//   a copy      an mbarrier whose phase completes when all its arrivals and all its bytes are in
//   a product   commit_products() and wait_for_products()
// nvcc reads this page; g++ reads emulator/hopper.h instead.
#pragma once
#include "device.cuh"

constexpr int WARPGROUP = 128;       // threads that multiply together
constexpr int SWIZZLE_SPAN = 128;    // bytes of a row of a tile: 64 numbers
constexpr int SWIZZLE_REPEAT = 1024; // bytes after which the pattern repeats: a tile begins at a multiple

#ifndef __CUDACC__
#include "emulator/hopper.h"
#else
#include <cuda.h>
#include <cudaTypedefs.h>

using TensorMap = CUtensorMap;

inline __device__ uint32_t shared_address(const void* generic) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(generic));
}

// Describes a tensor of bfloat16 to the copy engine: `size` numbers in each of four dimensions, the first side by side,
// the others `stride` bytes apart; and the box that one copy takes. What a box has outside the tensor becomes 0.
// The driver makes the map, and is asked for by name, so that nothing links to it. Returns a cudaError.
inline int encode(TensorMap& map, void* data, const uint64_t (&size)[4], const uint64_t (&stride)[3],
                  const uint32_t (&box)[4]) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
  auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorInsufficientDriver;
  constexpr uint32_t every[4] = {1, 1, 1, 1};
  auto status = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data, size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Is the machine code that would run the one for Hopper? Of the stub that all others get, launch bounds tell.
template <class... Parameters>
bool runs_on_hopper(void (*kernel)(Parameters...), int threads, int& error) {
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess && attributes.maxThreadsPerBlock >= threads;
}

// Counts arrivals and bytes. A phase completes when all that it was told to expect is in; the next begins at once.
struct Mbarrier {
  uint64_t bits;
};
inline __device__ void init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Shows the mbarriers that this thread made to the copy engine, which does not see ordinary writes.
inline __device__ void announce_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
inline __device__ void arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
inline __device__ void arrive_and_expect(Mbarrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of a phase: `parity` 0 of the first, third, ..; 1 of the second, .., and of the one before the
// first, which is over from the start.
inline __device__ void wait(Mbarrier& barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
}

// Starts the copy of one box to shared memory, from there in the tensor on; its bytes arrive at `landed`.
// In memory, row r of the box has chunk c (16 bytes) at c ^ (r % 8).
inline __device__ void copy_box(bfloat16* to, const TensorMap& map, int feature, int row, int head, int batch,
                                Mbarrier& landed) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(feature), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&landed))
      : "memory");
}

// Registers for each thread of this warpgroup from now on: what one gives away another can take.
template <int REGISTERS>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#include "wgmma.cuh"

#endif

// Only a compilation for sm_90a may call the above. The compiler's passes over the host's code see all of it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MINILLM_HOPPER 1
#endif

// Shared memory, seen as a T that begins at a multiple of 1024 bytes. The launch must ask for 1023 bytes more.
template <class T>
__device__ T& shared_from_1024() {
  auto& bytes = shared<T>();
  uint32_t before = kept(71) ? -shared_address(&bytes) % SWIZZLE_REPEAT : 0;
  return *reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(&bytes) + before);
}

// Tells wgmma where a factor lies in shared memory, swizzled as above. One product takes 16 steps of the sum:
//   a row's features (the sum runs over neighbours): `stride` bytes lead from 8 rows to the next 8; no `leading`
//   rows (the sum runs over rows): `stride` bytes lead from 8 rows to the next 8, `leading` from 64 columns to the next
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout: Matrix Descriptor Format", "Strides";
// the same in CUTLASS's formula, cute/atom/mma_traits_sm90_gmma.hpp: ((8,n),2):((8,SBO),1) and
// ((8,n),(8,k)):((1,LBO),(8,SBO)) in units of 16 bytes.
inline __device__ uint64_t descriptor(const Shared<bfloat16>* start, int leading, int stride) {
  constexpr uint64_t SWIZZLE_128_BYTES = 1;
  return (shared_address(start) & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         (kept(72) ? SWIZZLE_128_BYTES : 0) << 62;
}
