// Products on Hopper's tensor cores, as four warps start them: included by hopper.cuh for sm_90a only.
//
// d (64, N) is spread over the 128 threads as the mma of device.cuh has it: warp w holds rows 16 w to 16 w + 15, and of
// these the lane 4 g + t rows g and g + 8, columns 2t and 2t + 1 of each 8: d[n] is the n-th tile of 8 columns.
// Source: PTX ISA, "Register Fragments and Shared Memory Matrix Layouts for wgmma.mma_async.m64nNk16".

// Registers that a product reads or writes may be touched by nothing else until it is waited for. The compiler does not
// know that: an empty instruction that may change them keeps it from moving their uses past this line.
template <int N, int M>
__device__ void pin(float (&registers)[N][M]) {
#pragma unroll
  for (int e = 0; e < N * M; ++e) asm volatile("" : "+f"(registers[e / M][e % M])::"memory");
}
template <int N, int M>
__device__ void pin(uint32_t (&registers)[N][M]) {
#pragma unroll
  for (int e = 0; e < N * M; ++e) asm volatile("" : "+r"(registers[e / M][e % M])::"memory");
}

// Orders what these threads did to registers, those of d and of factors, before the products that follow.
template <int N, class... Factors>
__device__ void fence_registers(float (&d)[N][4], Factors&... factors) {
  pin(d), (pin(factors), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of products; then waits until they are done and d holds their sum.
inline __device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ void wait_for_products(float (&d)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(d);
}

// The registers of a product by name and by number.
#define MINILLM_D8(n) \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), \
      "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define MINILLM_D32(n) MINILLM_D8(n), MINILLM_D8(n + 2), MINILLM_D8(n + 4), MINILLM_D8(n + 6)
#define MINILLM_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MINILLM_R64 \
  MINILLM_R32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MINILLM_R128 \
  MINILLM_R64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" ", " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MINILLM_WGMMA(N, d, factors, add, transposed) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" d "}, " factors ", add, 1, 1, " transposed ";\n}"

// d = a b^T, or d += a b^T: 16 features of 64 rows and of N rows, both in shared memory.
inline __device__ void multiply_transposed_async(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(MINILLM_WGMMA("64", MINILLM_R32, "%32, %33", "%34", "0, 0")
               : MINILLM_D32(0)
               : "l"(a), "l"(b), "r"(int(add)));
}
inline __device__ void multiply_transposed_async(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(MINILLM_WGMMA("128", MINILLM_R64, "%64, %65", "%66", "0, 0")
               : MINILLM_D32(0), MINILLM_D32(8)
               : "l"(a), "l"(b), "r"(int(add)));
}

// d += a b: a (64, 16) in registers, of each warp its 16 rows as mma wants them; b 16 rows of N in shared memory.
inline __device__ void multiply_async(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(MINILLM_WGMMA("64", MINILLM_R32, "{%32, %33, %34, %35}, %36", "%37", "1")
               : MINILLM_D32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
inline __device__ void multiply_async(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(MINILLM_WGMMA("128", MINILLM_R64, "{%64, %65, %66, %67}, %68", "%69", "1")
               : MINILLM_D32(0), MINILLM_D32(8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
inline __device__ void multiply_async(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(MINILLM_WGMMA("256", MINILLM_R128, "{%128, %129, %130, %131}, %132", "%133", "1")
               : MINILLM_D32(0), MINILLM_D32(8), MINILLM_D32(16), MINILLM_D32(24)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
