// The emulated GPU: runs a grid block after block, the threads of a block as fibers, and watches what they do.
//
// It reports, with threads and source lines: barriers that not all threads reach; two threads touching the same memory
// without a barrier between; memory touched outside the tensors it was told of; copies used before they land. It counts
// bytes and operations. It says nothing of speed or weak memory order.
#pragma once
#include <utility>

#include "fiber.h"

#pragma GCC visibility push(hidden)  // one machine for each library: two builds loaded side by side share nothing

#include "memory.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr int MAX_THREADS = 1024, MAX_SHARED = 227 * 1024;  // of a block on an H200
constexpr int INVALID_VALUE = 1, INVALID_CONFIGURATION = 9, LAUNCH_FAILURE = 719;  // cudaError's numbers
constexpr int IN_ORDER = 0, REVERSED = 1, SHUFFLED = 2;

enum class State { READY, WAITING, LEFT };

struct Thread {
  Fiber fiber;
  int number, lane, warp;
  State state;
  Place place;     // of the barrier or warp operation it waits at
  int operations;  // values shown to the warp so far
  int group;       // of the asynchronous copies issued now
  std::vector<Copy> copies;
};

struct Meeting {  // of all threads of a block, or of the lanes of a warp
  int arrived, first;
  Place place;
};

constexpr int SLOT_BYTES = 32;
using Slots = char[WARP][SLOT_BYTES];
struct Warp {
  Meeting meeting;
  uint32_t epoch;              // grows at each __syncwarp
  alignas(16) Slots slots[2];  // what each lane shows the others; two, as a fast lane is up to one operation ahead
};

template <class T>
struct Shown {  // what the lanes of a warp showed each other
  const Slots* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, (*slots)[lane & (WARP - 1)], sizeof(T));
    return value;
  }
};

void thread_entry();

class Machine : public Memory {
 public:
  virtual ~Machine() = default;

  // Settings, by the extern "C" functions of cuda_runtime.h.
  int schedule = IN_ORDER;  // in which the threads of a block take their turns
  unsigned seed = 0;
  int mutant = 0;  // the line of a kernel that is left out: see kept() in cuda/device.cuh
  int traced_block = -1;
  bool mutant_reached = false;

  void reset() {
    counts = {}, mutant_reached = false;
    error.clear(), trace.clear(), regions.clear();
  }

  // Calls kernel(context) for each thread of each block. Returns a cudaError.
  int run(dim3 grid, int threads, size_t shared_bytes, void (*kernel)(const void*), const void* context) {
    if (threads < WARP || threads > MAX_THREADS || threads % WARP || grid.y > 65535 || grid.z > 65535) {
      return INVALID_CONFIGURATION;
    }
    if (shared_bytes > MAX_SHARED) return INVALID_VALUE;
    gridDim = grid, blockDim = dim3(threads), kernel_ = kernel, context_ = context;
    start_launch(shared_bytes);
    threads_.resize(threads), warps_.resize(threads / WARP), order_.resize(threads);
    random_ = seed;
    for (unsigned number = 0; number < grid.x * grid.y * grid.z && error.empty(); ++number) run_block(number);
    return error.empty() ? 0 : LAUNCH_FAILURE;
  }

  Thread& self() { return *current_; }
  Warp& warp() { return warps_[current_->warp]; }

  // Waits until all threads of the block are here.
  void barrier(Place place) {
    if (!meet(meeting_, 0, static_cast<int>(threads_.size()), place)) return;
    now_.epoch = ++epoch_, ++counts.barriers;
    barrier_ = place;
    all_met();
    if (traced_) tell_phase(place);
  }

  // Waits until all lanes of the warp are here. Only `__syncwarp` also orders their memory.
  void meet_warp(Place place, bool orders_memory) {
    bool last = meet(warp().meeting, self().warp * WARP, WARP, place);
    if (last && orders_memory) now_.warp_epoch = ++warp().epoch;
  }

  // Shows `value` to the warp and waits for those of the other lanes.
  template <class T>
  Shown<T> show(const T& value, Place place) {
    static_assert(sizeof(T) <= SLOT_BYTES);
    Slots& slots = warp().slots[self().operations++ & 1];
    std::memcpy(slots[self().lane], &value, sizeof(T));
    meet_warp(place, false);
    return {&slots};
  }

  // Asynchronous copies of 16 bytes: they land only when waited for, as late as the hardware may.
  void copy_later(char* to, const char* from) {
    if (!touch(to, 16, true) || (from && !reach(from, 16, false))) return;
    self().copies.push_back({to, from, self().group});
    start_copy(self().copies.back());
  }
  void land_copies(int groups_still_under_way) {
    auto& copies = self().copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group < self().group - groups_still_under_way; ++landed) {
      land(copies[landed]);
    }
    copies.erase(copies.begin(), copies.begin() + landed);
  }

 protected:
  // What async.h adds to the run of a block.
  virtual void block_starts() {}
  virtual void block_ends() {}
  virtual void all_met() {}  // all threads, at a barrier
  virtual void thread_leaves() {}
  virtual bool something_lands() { return false; }  // asked when every thread waits

  void run_block(unsigned number) {
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    ++counts.blocks, ++epoch_, broken_ = false, meeting_ = {};
    start_block(number);
    for (Warp& warp : warps_) warp.meeting = {};
    for (size_t i = 0; i < threads_.size(); ++i) start(threads_[i], static_cast<int>(i));
    traced_ = static_cast<int>(number) == traced_block;
    if (traced_) {
      tell("block (%u, %u, %u) of (%u, %u, %u): %zu threads, %zu bytes of shared memory\n", blockIdx.x, blockIdx.y,
           blockIdx.z, gridDim.x, gridDim.y, gridDim.z, threads_.size(), shared_bytes());
      tell_header();
    }
    block_starts();
    while (round()) {
    }
    block_ends();
    if (traced_) tell_phase({"the end", 0});
  }

  void start(Thread& thread, int number) {
    order_[number] = schedule == REVERSED ? static_cast<int>(threads_.size()) - 1 - number : number;
    thread.number = number, thread.lane = number % WARP, thread.warp = number / WARP;
    thread.state = State::READY;
    thread.operations = thread.group = 0;
    thread.copies.clear();
    thread.fiber.start(thread_entry);
  }

  void shuffle() {
    for (size_t left = order_.size(); left > 1; --left) {
      std::swap(order_[left - 1], order_[random() % left]);
    }
  }
  uint32_t random() {  // Knuth's; its upper half is random enough for an order
    random_ = random_ * 1664525 + 1013904223;
    return random_ >> 16;
  }

  // Lets every thread that can run do so until it waits or leaves; false when there is nothing more to run.
  bool round() {
    if (schedule == SHUFFLED) shuffle();
    bool ran = false, waits = false;
    for (int number : order_) {
      Thread& thread = threads_[number];
      if (thread.state == State::READY) {
        ran = true, current_ = &thread;
        threadIdx = {static_cast<unsigned>(number), 0, 0};
        now_ = {epoch_, warps_[thread.warp].epoch, number};
        scheduler_.enter(thread.fiber);
        if (broken_) return false;
      }
      waits = waits || thread.state == State::WAITING;
    }
    if (!ran && waits && something_lands()) return true;
    if (!ran && waits) tell_deadlock();
    return ran;
  }

  friend void thread_entry();
  void run_thread() {
    kernel_(context_);
    thread_leaves();
    self().state = State::LEFT;
    self().fiber.enter(scheduler_);
  }

  // True for the one that came last, when it lets the others go on.
  bool meet(Meeting& meeting, int begin, int members, Place place) {
    if (!meeting.arrived) meeting.first = self().number, meeting.place = place;
    if (!(meeting.place == place)) {
      fail("divergent barrier: thread %d waits at %s:%d, thread %d at %s:%d", self().number, place.name(), place.line,
           meeting.first, meeting.place.name(), meeting.place.line);
      broken_ = true;
    }
    self().place = place, self().state = State::WAITING;
    if (broken_ || ++meeting.arrived < members) {
      self().fiber.enter(scheduler_);
      return false;
    }
    meeting.arrived = 0;
    for (int i = begin; i < begin + members; ++i) threads_[i].state = State::READY;
    return true;
  }

  virtual void tell_deadlock() {
    const Thread *waiting = nullptr, *other = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state == State::WAITING && !waiting) waiting = &thread;
    }
    for (const Thread& thread : threads_) {
      if (thread.state == State::LEFT || !(thread.place == waiting->place)) other = &thread;
    }
    if (!other) {  // a barrier of the warp and one of the block, on one line
      return fail("divergent barrier: thread %d waits at %s:%d, others at another barrier of this line",
                  waiting->number, waiting->place.name(), waiting->place.line);
    }
    fail("divergent barrier: thread %d waits at %s:%d, but thread %d %s", waiting->number, waiting->place.name(),
         waiting->place.line, other->number, other->state == State::LEFT ? "has left the kernel" : "waits elsewhere");
  }

  void (*kernel_)(const void*) = nullptr;
  const void* context_ = nullptr;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  uint32_t random_ = 0;
  Meeting meeting_{};    // of the block
  bool broken_ = false;  // the block cannot go on
  bool traced_ = false;
  uint32_t epoch_ = 0;   // grows at each __syncthreads and each block
};

}  // namespace emulator

#pragma GCC visibility pop
