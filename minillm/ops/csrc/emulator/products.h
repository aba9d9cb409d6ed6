// Products under way: the registers of one hold no number until it is waited for.
#pragma once
#include "async.h"
#include "wgmma.h"

#pragma GCC visibility push(hidden)

namespace emulator {

constexpr int GROUP_THREADS = 4 * WARP;

class Hopper : public Async {
 public:
  // Starts d (64, columns) = or += a b, of which this thread has columns / 2 numbers. All four warps must come.
  // `a` null: factor a is in shared memory too.
  void start_product(float* d, int columns, const uint32_t* a, uint64_t a_bits, uint64_t b_bits, bool b_transposed,
                     bool add, Place place) {
    Products& mine = products_[self().number];
    const int number = self().number / GROUP_THREADS;
    std::shared_ptr<Product>& next = next_[number];
    if (!next) next = std::make_shared<Product>(Product{columns, a != nullptr, b_transposed, a_bits, b_bits, {}, {}});
    std::shared_ptr<Product> product = next;  // the others may have started another when this thread goes on
    if (product->a_bits != a_bits || product->b_bits != b_bits) fail("%s multiplies by other descriptors", who());
    if (!mine.fenced) fail("%s starts a product, and no fence orders its registers before it", who());
    if (a) product->take_registers(a, self().number);

    Underway one{product, mine.groups + 1, d, add, {}};
    bool first = std::none_of(mine.under_way.begin(), mine.under_way.end(), [&](auto& other) { return other.d == d; });
    if (first && add) one.before.assign(d, d + columns / 2);
    mine.under_way.push_back(one);
    for (int e = 0; e < columns / 2; ++e) std::memcpy(d + e, &POISON, sizeof POISON);
    if (meet(meetings_[number], number * GROUP_THREADS, GROUP_THREADS, place)) {
      next.reset();
      counts.mma += columns / 8 * 4;  // as many as four warps would need of mma's 16 x 16 x 8
      product->readable = note_factor(a_bits, GROUP_ROWS, false, number, one.group, a == nullptr) &&
                          note_factor(b_bits, columns, b_transposed, number, one.group, true);
    }
  }
  void fence_registers() { products_[self().number].fenced = true; }
  void commit_products() { ++products_[self().number].groups; }

  // Waits until at most so many of the committed groups are under way.
  void wait_for_products(uint32_t still_under_way, Place place) {
    meet_warp(place, false);
    Products& mine = products_[self().number];
    uint32_t over = mine.groups - std::min(mine.groups, still_under_way);
    while (!mine.under_way.empty() && mine.under_way.front().group <= over) {
      Underway one = std::move(mine.under_way.front());
      mine.under_way.erase(mine.under_way.begin());
      finish(one, mine);
    }
    end_products(over), mine.fenced = false;
  }

 protected:
  void block_starts() override {
    Async::block_starts();
    products_.assign(threads_.size(), {});
    next_.assign(threads_.size() / GROUP_THREADS + 1, nullptr), meetings_.assign(next_.size(), {});
  }
  void thread_leaves() override {
    if (!products_[self().number].under_way.empty()) fail("%s leaves while its product is under way", who());
  }

 private:
  static constexpr uint32_t POISON = 0x7fa00000;  // NaN, of the kind that any arithmetic turns into another

  bool note_factor(uint64_t bits, int rows, bool transposed, int warpgroup, uint32_t group, bool in_shared_memory) {
    if (!in_shared_memory) return true;
    Descriptor factor(bits);
    if (const char* wanted = factor.refusal()) {
      fail("a factor of a product should have %s", wanted);
      return false;
    }
    for (int row = 0; row < rows; row += transposed ? 8 : 1) {
      for (int k = 0; k < STEPS; k += transposed ? 1 : 8) {
        if (!product_reads(factor.address(row, k, transposed), warpgroup, group)) return false;
      }
    }
    return true;
  }

  void finish(Underway& one, Products& mine) {
    Product& product = *one.product;
    int floats = product.columns / 2;
    if (product.b.empty() && product.readable) product.read_factors([&](uint32_t from) { return number_at(from); });
    if (!one.add) one.before.assign(floats, 0);
    product.add_to(one.before.data(), self().number);
    for (Underway& later : mine.under_way) {
      if (later.d == one.d) return later.before.swap(one.before);
    }
    for (int e = 0; e < floats; ++e) {
      if (std::memcmp(one.d + e, &POISON, sizeof POISON)) fail("%s touched registers of a product under way", who());
      one.d[e] = one.before[e];
    }
  }
  float number_at(uint32_t address) {
    __nv_bfloat16 number;
    std::memcpy(&number, shared() + address - FIRST_ADDRESS, sizeof number);
    return __bfloat162float(number);
  }

  std::vector<Products> products_;               // of the threads
  std::vector<std::shared_ptr<Product>> next_;   // of the warp groups: what its threads are about to start
  std::vector<Meeting> meetings_;                // theirs
};

inline Hopper machine;

inline void thread_entry() { machine.run_thread(); }

}  // namespace emulator

#pragma GCC visibility pop
