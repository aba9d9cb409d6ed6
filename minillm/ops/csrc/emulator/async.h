// What goes on beside the threads of a block on Hopper: copies of boxes, and who may touch what they bring.
//
// A copy lands as late as it may: when every thread waits for something.
#pragma once
#include "mbarriers.h"

#pragma GCC visibility push(hidden)

namespace emulator {

class Async : public Mbarriers {
 public:
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

  // Shared memory is about to be touched by a thread, which may not have waited for the copy that brought it.
  bool touch(const void* address, int bytes, bool write) {
    int64_t byte = static_cast<const char*>(address) - shared();
    if (!mbarriers_.empty() && in_shared(byte + FIRST_ADDRESS, bytes)) {
      Chunk& chunk = chunks_[byte / CHUNK];
      if (!chunk.under_way && !knows(now_.thread / WARP, chunk)) {
        fail("race: %s %s byte %ld of shared memory, and did not wait for the mbarrier of its copy", who(),
             write ? "writes" : "reads", long(byte));
      }
      if (write) chunk.mbarrier = -1;  // a product would not see it: that needs a fence we do not emulate
    }
    return Memory::touch(address, bytes, write);
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
      if (knows(warp, chunk)) continue;
      fail("race: warp %d multiplies byte %ld of shared memory, and did not wait for the mbarrier of its copy", warp,
           long(byte));
    }
    chunk.read[warpgroup] = group;
    counts.shared_read += CHUNK;
    return true;
  }

  // The groups of this warp's products up to number `group` are over.
  void end_products(uint32_t group) { clock().products[now_.thread / WARP] = group; }

 protected:
  // Lets a copy land, the `number`-th of those under way; returns its mbarrier.
  int land_box(size_t number) {
    BoxCopy copy = boxes_[number];
    boxes_.erase(boxes_.begin() + number);
    now_.thread = copy.thread;
    auto land_chunk = [&](uint32_t offset, const char* from, int64_t begin, int64_t end) {
      char* to = copy.to + offset;
      std::memset(to, 0, CHUNK);
      bool whole = end - begin == CHUNK && reinterpret_cast<uintptr_t>(from) % CHUNK == 0;
      const int step = whole ? CHUNK : copy.map.element_bytes;  // the engine needs no alignment of its boxes' starts
      for (int64_t byte = begin; byte < end; byte += step, from += step) {
        if (reach(from, step, false)) std::memcpy(to + byte, from, step);
      }
      chunks_[(to - shared()) / CHUNK].under_way = false;
      mark_in_flight(to, false);
    };
    copy.map.each_chunk(copy.start, address_of(copy.to), land_chunk);
    counts.shared_written += copy.map.box_bytes();
    MbarrierState& barrier = mbarriers_[copy.mbarrier];
    barrier.bytes -= copy.map.box_bytes();
    if (barrier.bytes < 0) fail("an mbarrier gets %ld bytes more than it was told to expect", long(-barrier.bytes));
    return copy.mbarrier;
  }

  // The hooks of machine.h.
  void block_starts() override {
    chunks_.assign(shared_bytes() / CHUNK + 1, {-1, 0, false, {}});
    boxes_.clear();
    Mbarriers::block_starts();
  }
  void block_ends() override {
    if (!boxes_.empty()) fail("block %u ends while a copy to its shared memory is under way", block_);
  }
  bool something_lands() override {
    if (boxes_.empty()) return false;
    settle(land_box(schedule == IN_ORDER ? 0 : schedule == REVERSED ? boxes_.size() - 1 : random() % boxes_.size()));
    return true;
  }
 private:
  bool knows(int warp, const Chunk& chunk) const {  // that the copy to there has landed
    return chunk.mbarrier < 0 || clocks_[warp].phases[chunk.mbarrier] >= chunk.phase;
  }
  void check_overwritten(const Chunk& chunk, int64_t offset) {
    bool landed = !chunk.under_way && knows(now_.thread / WARP, chunk);
    if (!landed) fail("race: %s copies over byte %ld of shared memory before an earlier copy", who(), long(offset));
    for (int warp = 0; warp < static_cast<int>(clocks_.size()); ++warp) {
      if (clock().products[warp] >= chunk.read[warp / 4]) continue;
      fail("race: %s copies over byte %ld of shared memory that warp %d may still multiply", who(), long(offset), warp);
    }
  }

  std::vector<Chunk> chunks_;
  std::vector<BoxCopy> boxes_;  // under way, in the order in which they were asked for
};

}  // namespace emulator

#pragma GCC visibility pop
