// What the stages of the factors' gradients share: where a sum goes.
#pragma once
#include "lora_gather.cuh"

constexpr int ADD_THREADS = 128;

template <class F>
__device__ void finish(const Sum& s, const Adapter& adapter, int r, int k, float sum) {
  store(row_of<F>(s.out, adapter.number, r) + k * s.out.feature, adapter.scale * sum);
}

// The sum over all positions, or over those of one part.
template <class F>
__device__ void keep_sum(const Sum& s, const Adapter& adapter, int part, int r, int k, float sum) {
  if (s.parts == 1) return finish<F>(s, adapter, r, k, sum);
  store(s.room + ((int64_t{part} * s.thin.N + adapter.number) * s.thin.R + r) * s.width + k, sum);
}

template <class F>
__global__ void add_rooms(Sum s) {
  int64_t e = int64_t{blockIdx.x} * ADD_THREADS + threadIdx.x, size = int64_t{s.thin.N} * s.thin.R * s.width;
  if (e >= size && kept(1166)) return;
  float sum = 0;
  for (int part = 0; part < s.parts; ++part) sum += load(s.room + part * size + e);
  int64_t row = e / s.width;
  finish<F>(s, describe(s.thin, row / s.thin.R), row % s.thin.R, e % s.width, sum);
}

template <class F>
int add_parts(const Sum& s, void* stream) {
  if (s.parts == 1) return 0;
  dim3 grid(parts_of(int64_t{s.thin.N} * s.thin.R * s.width, ADD_THREADS));
  return launch(add_rooms<F>, grid, ADD_THREADS, 0, stream, s);
}

inline bool sound(const Sum& s) {
  return s.parts >= 1 && (s.parts == 1 || s.room) && int64_t{s.thin.N} * s.parts <= 65535;
}
