// The mbarriers of a block, and what each warp knows to be over because it waited for one.
#pragma once
#include "clocks.h"
#include "machine.h"

#pragma GCC visibility push(hidden)

namespace emulator {

// Of the block's memory: a tile that must begin at a multiple of 1024 does so only if the kernel sees to it.
constexpr uint32_t FIRST_ADDRESS = 1024 + 128;

class Mbarriers : public Machine {
 public:
  int64_t address_of(const void* shared_memory) {
    return static_cast<const char*>(shared_memory) - shared() + FIRST_ADDRESS;
  }
  bool in_shared(int64_t address, int64_t bytes) const {
    return address >= FIRST_ADDRESS && address + bytes <= FIRST_ADDRESS + static_cast<int64_t>(shared_bytes());
  }

  void make_mbarrier(void* object, int arrivals) {
    int64_t address = address_of(object);
    if (!in_shared(address, 8) || address % 8) return fail("%s makes an mbarrier outside shared memory", who());
    if (find(object, false) >= 0) return fail("%s makes an mbarrier where there is one", who());
    if (arrivals < 1) return fail("%s makes an mbarrier of %d arrivals", who(), arrivals);
    if (mbarriers_.size() == MAX_MBARRIERS) return fail("more than %d mbarriers are not emulated", MAX_MBARRIERS);
    mbarriers_.push_back({address, arrivals, arrivals, 0, 0, {}, {}, now_.thread, now_.epoch, false, {"the start", 0}});
  }
  void announce_mbarriers() {
    for (MbarrierState& one : mbarriers_) one.announced = one.announced || one.maker == now_.thread;
  }

  // An arrival at an mbarrier, which is to wait for so many more bytes too.
  void arrive(void* object, int64_t bytes, Place place) {
    int number = find(object);
    if (number < 0) return;
    MbarrierState& one = mbarriers_[number];
    if (one.missing == 0) return fail("%s arrives at an mbarrier that misses no arrival in this phase", who());
    --one.missing, one.bytes += bytes, one.place = place;
    one.known.learn(clock());
    settle(number);
  }
  void wait_at(void* object, int parity, Place place) {
    int number = find(object);
    if (number < 0) return;
    while (static_cast<int>(mbarriers_[number].phase & 1) == parity) {
      waits_for_[self().number] = number;
      self().place = place, self().state = State::WAITING;
      self().fiber.enter(scheduler_);
    }
    clock().learn(mbarriers_[number].over);
  }

 protected:
  Clock& clock() { return clocks_[now_.thread / WARP]; }

  // The number of an mbarrier, -1 if there is none there.
  int find(const void* object, bool used = true) {
    int64_t address = address_of(object);
    for (size_t i = 0; i < mbarriers_.size(); ++i) {
      const MbarrierState& one = mbarriers_[i];
      if (one.address != address) continue;
      if (used && one.maker != now_.thread && one.epoch == now_.epoch) {
        fail("race: %s uses an mbarrier that thread %d made, with no barrier between", who(), one.maker);
      }
      return static_cast<int>(i);
    }
    if (used) fail("%s uses an mbarrier that was never made", who());
    return -1;
  }

  // The hooks of machine.h.
  void block_starts() override {
    clocks_.assign(threads_.size() / WARP, {});
    waits_for_.assign(threads_.size(), -1);
    mbarriers_.clear();
  }
  void all_met() override {
    Clock all;
    for (const Clock& one : clocks_) all.learn(one);
    for (Clock& one : clocks_) one = all;
  }
  void tell_deadlock() override {
    for (const Thread& thread : threads_) {
      int number = waits_for_[thread.number];
      if (thread.state != State::WAITING || number < 0) continue;
      const MbarrierState& one = mbarriers_[number];
      return fail("deadlock: thread %d waits at %s:%d for an mbarrier that misses %d arrivals and %ld bytes",
                  thread.number, thread.place.name(), thread.place.line, one.missing, long(one.bytes));
    }
    Machine::tell_deadlock();
  }

  // Ends the phase of an mbarrier that has all it waits for, and begins the next.
  void settle(int number) {
    MbarrierState& one = mbarriers_[number];
    if (one.missing || one.bytes) return;
    one.missing = one.count, ++one.phase;
    one.known.phases[number] = one.phase, one.over = one.known;
    for (Thread& thread : threads_) {
      if (waits_for_[thread.number] == number) thread.state = State::READY, waits_for_[thread.number] = -1;
    }
    if (traced_) tell_phase(one.place);
  }

  std::vector<MbarrierState> mbarriers_;
  std::vector<Clock> clocks_;   // of the warps
  std::vector<int> waits_for_;  // of the threads: the mbarrier, or -1
};

}  // namespace emulator

#pragma GCC visibility pop
