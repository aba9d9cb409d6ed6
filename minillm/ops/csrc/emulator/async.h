// What goes on beside the threads of a block on Hopper: copies of boxes, and the mbarriers they land at.
//
// A copy lands as late as it may: when every thread waits for something.
#pragma once
#include "clocks.h"
#include "machine.h"

#pragma GCC visibility push(hidden)

namespace emulator {

// Of the block's memory: a tile that must begin at a multiple of 1024 does so only if the kernel sees to it.
constexpr uint32_t FIRST_ADDRESS = 1024 + 128;

class Async : public Machine {
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

  // Starts the copy of a box of a tensor, from element `start` of it on.
  void start_box(const TensorMap& map, const int64_t (&start)[MAX_RANK], char* to, void* landed) {
    int mbarrier = find(landed);
    if (mbarrier < 0) return;
    int64_t address = address_of(to), bytes = map.box_bytes();
    int repeat = map.span ? 8 * map.span : 128;
    if (!in_shared(address, bytes)) return fail("%s copies a box to outside the block's shared memory", who());
    if (address % repeat) return fail("%s copies a box to an address that is no multiple of %d", who(), repeat);
    if (map.span && int64_t{map.box[0]} * map.element_bytes != map.span) return fail("rows shorter than the swizzle");
    if (!mbarriers_[mbarrier].announced) return fail("%s copies to an mbarrier that the engine was not told of", who());
    for (int64_t offset = address - FIRST_ADDRESS; offset < address - FIRST_ADDRESS + bytes; offset += CHUNK) {
      Chunk& chunk = chunks_[offset / CHUNK];
      check_overwritten(chunk, offset);
      chunk.mbarrier = mbarrier, chunk.phase = mbarriers_[mbarrier].phase + 1, chunk.under_way = true;
      mark_in_flight(shared() + offset, true);
    }
    boxes_.push_back({map, {start[0], start[1], start[2], start[3], start[4]}, to, mbarrier, now_.thread});
  }

  // 16 bytes of a factor are about to be read by a product of this warp group, in this group of its products.
  bool product_reads(int64_t address, int warpgroup, uint32_t group) {
    if (!in_shared(address, CHUNK)) {
      fail("%s multiplies what lies outside the block's shared memory", who());
      return false;
    }
    Chunk& chunk = chunks_[(address - FIRST_ADDRESS) / CHUNK];
    int64_t byte = address - FIRST_ADDRESS;
    if (chunk.mbarrier < 0) fail("%s multiplies byte %ld of shared memory, which no copy fills", who(), long(byte));
    if (chunk.under_way) {
      fail("%s multiplies byte %ld of shared memory while an asynchronous copy to it is under way", who(), long(byte));
    }
    for (int warp = 4 * warpgroup; warp < 4 * warpgroup + 4; ++warp) {
      if (chunk.mbarrier >= 0 && clocks_[warp].phases[chunk.mbarrier] < chunk.phase) {
        fail("race: warp %d multiplies byte %ld of shared memory, and did not wait for the mbarrier of its copy", warp,
             long(byte));
      }
    }
    chunk.read[warpgroup] = group;
    counts.shared_read += CHUNK;
    return true;
  }

  // The groups of this warp's products up to number `group` are over.
  void end_products(uint32_t group) { clock().products[now_.thread / WARP] = group; }

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

  // Lets a copy land, the `number`-th of those under way; returns its mbarrier.
  int land_box(size_t number) {
    BoxCopy copy = boxes_[number];
    boxes_.erase(boxes_.begin() + number);
    now_.thread = copy.thread;
    copy.map.each_chunk(copy.start, address_of(copy.to), [&](const char* from, int bytes, uint32_t to) {
      std::memset(copy.to + to, 0, CHUNK);
      if (bytes && reach(from, bytes, false)) std::memcpy(copy.to + to, from, bytes);
      chunks_[(copy.to + to - shared()) / CHUNK].under_way = false;
      mark_in_flight(copy.to + to, false);
    });
    counts.shared_written += copy.map.box_bytes();
    MbarrierState& barrier = mbarriers_[copy.mbarrier];
    barrier.bytes -= copy.map.box_bytes();
    if (barrier.bytes < 0) fail("an mbarrier gets %ld bytes more than it was told to expect", long(-barrier.bytes));
    return copy.mbarrier;
  }

  // The hooks of machine.h.
  void block_starts() override {
    chunks_.assign(shared_bytes() / CHUNK + 1, {-1, 0, false, {}});
    clocks_.assign(threads_.size() / WARP, {});
    waits_for_.assign(threads_.size(), -1);
    mbarriers_.clear(), boxes_.clear();
  }
  void block_ends() override {
    if (!boxes_.empty()) fail("block %u ends while a copy to its shared memory is under way", block_);
  }
  void all_met() override {
    Clock all;
    for (const Clock& one : clocks_) all.learn(one);
    for (Clock& one : clocks_) one = all;
  }
  bool something_lands() override {
    if (boxes_.empty()) return false;
    settle(land_box(schedule == IN_ORDER ? 0 : schedule == REVERSED ? boxes_.size() - 1 : random() % boxes_.size()));
    return true;
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

 private:
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

  void check_overwritten(const Chunk& chunk, int64_t offset) {
    const Clock& known = clock();
    bool landed = chunk.mbarrier < 0 || (!chunk.under_way && known.phases[chunk.mbarrier] >= chunk.phase);
    if (!landed) fail("race: %s copies over byte %ld of shared memory before an earlier copy", who(), long(offset));
    for (int warp = 0; warp < static_cast<int>(clocks_.size()); ++warp) {
      if (known.products[warp] >= chunk.read[warp / 4]) continue;
      fail("race: %s copies over byte %ld of shared memory that warp %d may still multiply", who(), long(offset), warp);
    }
  }

  std::vector<Chunk> chunks_;
  std::vector<Clock> clocks_;                // of the warps
  std::vector<int> waits_for_;               // of the threads: the mbarrier, or -1
  std::vector<MbarrierState> mbarriers_;
  std::vector<BoxCopy> boxes_;               // under way, in the order in which they were asked for
};

}  // namespace emulator

#pragma GCC visibility pop
