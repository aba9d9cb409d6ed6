// The emulated half of cuda/hopper.cuh: what a kernel asks of the copy engine, of mbarriers and of wgmma, watched.
#pragma once
#include "device.h"

#pragma GCC visibility push(hidden)

#define __grid_constant__

using emulator::TensorMap;

struct Mbarrier {
  uint64_t bits;
};

inline uint32_t shared_address(const void* address) { return machine.address_of(address); }

inline int encode(TensorMap& map, void* data, const uint64_t (&size)[4], const uint64_t (&stride)[3],
                  const uint32_t (&box)[4]) {
  map = {static_cast<char*>(data), 4, 2, SWIZZLE_SPAN, {}, {2}, {}};
  for (int d = 0; d < 4; ++d) map.size[d] = size[d], map.box[d] = box[d];
  for (int d = 1; d < 4; ++d) map.stride[d] = stride[d - 1];
  return map.refusal() ? emulator::INVALID_VALUE : 0;
}

template <class... Parameters>
bool runs_on_hopper(void (*)(Parameters...), int, int&) {
  return true;
}

inline void init(Mbarrier& barrier, int arrivals) { machine.make_mbarrier(&barrier, arrivals); }
inline void announce_barriers() { machine.announce_mbarriers(); }
inline void arrive(Mbarrier& barrier, MINILLM_PLACE) { machine.arrive(&barrier, 0, {file, line}); }
inline void arrive_and_expect(Mbarrier& barrier, int bytes, MINILLM_PLACE) {
  machine.arrive(&barrier, bytes, {file, line});
}
inline void wait(Mbarrier& barrier, int parity, MINILLM_PLACE) { machine.wait_at(&barrier, parity, {file, line}); }

inline void copy_box(Shared<bfloat16>* to, const TensorMap& map, int feature, int row, int head, int batch,
                     Mbarrier& landed) {
  machine.start_box(map, {feature, row, head, batch, 0}, reinterpret_cast<char*>(to), &landed);
}

template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}

template <int N, class... Factors>
void fence_registers(float (&)[N][4], Factors&...) {
  machine.fence_registers();
}
inline void commit_products() { machine.commit_products(); }
template <int N>
void wait_for_products(float (&)[N][4], MINILLM_PLACE) {
  machine.wait_for_products(0, {file, line});
}
template <int N>
void multiply_transposed_async(float (&d)[N][4], uint64_t a, uint64_t b, bool add, MINILLM_PLACE) {
  machine.start_product(d[0], 8 * N, nullptr, a, b, false, add, {file, line});
}
template <int N>
void multiply_async(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, MINILLM_PLACE) {
  machine.start_product(d[0], 8 * N, a, 0, b, true, true, {file, line});
}

#pragma GCC visibility pop
