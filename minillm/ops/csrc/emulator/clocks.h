// What is kept of copies and mbarriers while they are under way.
//
// __syncthreads() orders a whole block, and memory.h counts it; an mbarrier orders only those who arrive before those
// who wait. So each warp has a clock of what it knows to be over, and passes it on where it arrives (Lamport 1978; as a
// vector, Mattern 1989). A copy may overwrite only what its thread knows to have been read, and a product may read only
// what its warps know to have landed.
#pragma once
#include <algorithm>

#include "report.h"
#include "tensor_map.h"

namespace emulator {

constexpr int MAX_WARPS = 32, MAX_MBARRIERS = 32;

struct Clock {
  uint32_t products[MAX_WARPS] = {};    // groups of each warp's products that are over
  uint32_t phases[MAX_MBARRIERS] = {};  // phases of each mbarrier that are over
  void learn(const Clock& other) {
    for (int i = 0; i < MAX_WARPS; ++i) products[i] = std::max(products[i], other.products[i]);
    for (int i = 0; i < MAX_MBARRIERS; ++i) phases[i] = std::max(phases[i], other.phases[i]);
  }
};

struct MbarrierState {
  int64_t address;
  int count, missing;    // arrivals of a phase; those still to come
  int64_t bytes;         // expected and not yet landed
  uint32_t phase;        // so many are over
  Clock known, over;     // what those who arrived know: by now; when the last phase was over
  int maker;             // thread
  uint32_t epoch;        // of the block, when it was made
  bool announced;        // to the copy engine
  Place place;           // of the last arrival
};

struct Chunk {  // of 16 bytes of shared memory, as the copy engine and the tensor cores left it
  int mbarrier;    // where its copy arrives, -1 if none was ever asked for
  uint32_t phase;  // it has landed when so many phases are over
  bool under_way;
  uint32_t read[MAX_WARPS / 4];  // the last group of products of each warp group that reads it
};

struct BoxCopy {
  TensorMap map;
  int64_t start[MAX_RANK];
  char* to;
  int mbarrier;
  int thread;  // that asked for it
};

}  // namespace emulator
