// Many dot products at once, of rows that lie along the lanes.
//
// The idea: each product keeps a register of its own until the end, so the multiplications do not wait for each other,
// and the sums across the lanes, which are slow, are made for all products together.
#pragma once
#include "vector.h"

// Lane i of the result is the sum of all lanes of v[i]. Neighbours are added in pairs: N vectors become half as many
// whose lanes are sums of two, until one is left.
template <int N = LANES>
inline Vec lane_sums(Vec* v) {
  if constexpr (N > 1) {
    IntVec even, odd;
    for (int lane = 0; lane < LANES; ++lane) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    return lane_sums<N / 2>(v);
  }
  return v[0];
}

constexpr int AHEAD = 1024;  // bytes by which memory is asked for early; 512 and 2048 were as good

// products[i * J + j] += a[i] * b[j], lane by lane over the rows' `depth`; I * J <= LANES. Their `lane_sums` are the
// dot products. FAR: the rows a come from memory.
template <int I, int J, bool FAR, class A, class B>
inline void add_products(Vec (&products)[LANES], const A* const (&a)[I], const B* const (&b)[J], int depth) {
  static_assert(I * J <= LANES);
  const auto multiply = [&](int k, auto part) {
    Vec right[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) right[j] = part(b[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      if constexpr (FAR) __builtin_prefetch(reinterpret_cast<const char*>(a[i] + k) + AHEAD, 0, 2);
      const Vec left = part(a[i] + k);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) products[i * J + j] += left * right[j];
    }
  };
  int k = 0;
  for (; k + LANES <= depth; k += LANES) multiply(k, [](const auto* p) { return load(p); });
  if (depth - k == LANES / 2)
    multiply(k, [](const auto* p) { return load_first(p, LANES / 2); });  // of a known size: no call of memcpy
  else if (k < depth)
    multiply(k, [&](const auto* p) { return load_first(p, depth - k); });
}

template <int I, int J, bool FAR, class A, class B>
inline Vec dots(const A* const (&a)[I], const B* const (&b)[J], int depth) {
  Vec products[LANES] = {};
  add_products<I, J, FAR>(products, a, b, depth);
  return lane_sums(products);
}
