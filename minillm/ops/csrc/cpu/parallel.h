// Work spread over torch's own threads. binding.cpp, the one file that knows torch, defines the function.
#pragma once
#include <cstdint>

extern "C" void minillm_parallel(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(i) for i = 0 .. count - 1. What one i computes never depends on the number of threads, so neither does the
// result: one thread and many give the same bits.
template <class Body>
void parallel(int64_t count, const Body& body) {
  minillm_parallel(
      count,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
      },
      const_cast<Body*>(&body));
}
