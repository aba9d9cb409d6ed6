// The memories of the emulated GPU, watched: every access by a kernel is counted, and checked against earlier ones.
#pragma once
#include <algorithm>
#include <vector>

#include "report.h"

namespace emulator {

constexpr int WARP = 32;

struct Access {  // by a thread, after so many barriers of its block and of its warp
  uint32_t epoch, warp_epoch;
  int thread;
};

struct Cell {  // who touched two bytes of shared memory last
  Access write, read, other_read;
  bool in_flight;  // an asynchronous copy is under way to here
};

struct Copy {  // an asynchronous copy that has not landed yet
  char* to;
  const char* from;  // null: zeros
  int group;
};

struct Region {  // of global memory
  const char *begin, *end;
  std::vector<uint32_t> writers;  // for each byte the thread that wrote it in this launch, counted from 1
};
constexpr uint32_t MANY_BY_ATOMICS = ~0u;  // a writer

class Memory : public Report {
 public:
  std::vector<Region> regions;  // where global memory may be touched; empty: anywhere

  // Global memory is about to be read or written; false if that must not be.
  bool reach(const void* address, int bytes, bool write, bool atomic = false) {
    (write ? counts.global_written : counts.global_read) += bytes;
    if (!check_aligned(address, bytes)) return false;
    auto* begin = static_cast<const char*>(address);
    for (Region& region : regions) {
      if (begin < region.begin || begin + bytes > region.end) continue;
      note(region, begin - region.begin, bytes, write, atomic);
      return true;
    }
    if (regions.empty()) return true;
    fail("%s %s %d bytes of global memory outside every tensor", who(), write ? "writes" : "reads", bytes);
    return false;
  }

  // Shared memory is about to be read or written; false if that must not be.
  bool touch(const void* address, int bytes, bool write) {
    (write ? counts.shared_written : counts.shared_read) += bytes;
    if (!check_aligned(address, bytes)) return false;
    int64_t offset = static_cast<const char*>(address) - shared();
    if (offset < 0 || offset + bytes > bytes_) {
      fail("%s %s shared memory outside the block's %ld bytes", who(), write ? "writes" : "reads", long(bytes_));
      return false;
    }
    for (int64_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; ++cell) note(cells_[cell], write);
    return true;
  }

  size_t shared_bytes() const { return bytes_; }
  char* shared() {
    auto address = reinterpret_cast<uintptr_t>(shared_.data());
    return reinterpret_cast<char*>((address + 127) & ~uintptr_t{127});
  }

  // A GPU moves a number of 2, 4, 8 or 16 bytes only where such numbers begin; several of them, where one does.
  bool check_aligned(const void* address, int bytes = 16) {
    int whole = std::min(bytes & -bytes, 16);
    if (reinterpret_cast<uintptr_t>(address) % whole == 0) return true;
    fail("%s moves %d bytes at an address between", who(), bytes);
    return false;
  }

 protected:
  void start_launch(size_t shared_bytes) {
    shared_.resize(shared_bytes + 128), cells_.resize(shared_bytes / 2 + 1), bytes_ = shared_bytes;
    for (Region& region : regions) region.writers.assign(region.end - region.begin, 0);
  }
  void start_block(uint32_t number) {
    block_ = number, barrier_ = {"the start", 0};
    std::memset(shared_.data(), 0xff, shared_.size());  // NaN, whether read as float or as bfloat16
    for (Cell& cell : cells_) cell.in_flight = false;
  }

  void start_copy(const Copy& copy) {
    for (int cell = 0; cell < 8; ++cell) cell_of(copy.to)[cell].in_flight = true;
  }
  void land(const Copy& copy) {
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    for (int cell = 0; cell < 8; ++cell) {
      cell_of(copy.to)[cell].in_flight = false;
      note(cell_of(copy.to)[cell], true);  // written now, for whoever reads it without a barrier
    }
  }

  void mark_in_flight(const void* address, bool in_flight) {  // 16 bytes
    for (int cell = 0; cell < 8; ++cell) cell_of(address)[cell].in_flight = in_flight;
  }

  const char* who() {
    std::snprintf(name_, sizeof name_, "thread %d of block %u", now_.thread, block_);
    return name_;
  }

  Access now_{};      // whom the accesses are by
  Place barrier_{};   // the last one
  uint32_t block_ = 0;

 private:
  Cell* cell_of(const void* address) { return &cells_[(static_cast<const char*>(address) - shared()) / 2]; }

  void note(Cell& cell, bool write) {
    if (cell.in_flight) {
      fail("%s %s byte %ld of shared memory while an asynchronous copy to it is under way (after %s:%d)", who(),
           write ? "writes" : "reads", (&cell - cells_.data()) * 2L, barrier_.name(), barrier_.line);
    }
    check(cell, cell.write, write, true);
    if (write) {
      check(cell, cell.read, true, false), check(cell, cell.other_read, true, false);
      cell.write = now_;
    } else {
      if (cell.read.thread != now_.thread) cell.other_read = cell.read;
      cell.read = now_;
    }
  }

  // A race: another thread's access since the last barrier, unless a __syncwarp of their common warp lies between.
  void check(const Cell& cell, const Access& before, bool writes, bool wrote) {
    if (before.epoch != now_.epoch || before.thread == now_.thread) return;
    if (before.thread / WARP == now_.thread / WARP && before.warp_epoch != now_.warp_epoch) return;
    fail("race: %s %s byte %ld of shared memory that thread %d %s, with no barrier between (after %s:%d)", who(),
         writes ? "writes" : "reads", (&cell - cells_.data()) * 2L, before.thread, wrote ? "wrote" : "read",
         barrier_.name(), barrier_.line);
  }

  // Nothing orders two threads' accesses of global memory within a launch, but atomics among themselves.
  void note(Region& region, int64_t offset, int bytes, bool write, bool atomic) {
    uint32_t me = block_ * 1024 + now_.thread + 1, mark = atomic ? MANY_BY_ATOMICS : me;
    for (int64_t byte = offset; byte < offset + bytes; ++byte) {
      uint32_t& writer = region.writers[byte];
      if (writer && writer != me && writer != mark) tell_race(writer, write);
      if (write) writer = mark;
    }
  }

  void tell_race(uint32_t writer, bool write) {
    if (writer == MANY_BY_ATOMICS) {
      return fail("race: %s %s global memory that an atomic wrote", who(), write ? "writes" : "reads");
    }
    fail("race: %s %s global memory that thread %u of block %u wrote", who(), write ? "writes" : "reads",
         (writer - 1) % 1024, (writer - 1) / 1024);
  }

  std::vector<char> shared_;
  std::vector<Cell> cells_;
  int64_t bytes_ = 0;
  char name_[60];
};

}  // namespace emulator
