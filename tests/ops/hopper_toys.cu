// Small kernels for test_emulated_hopper.py; they run on the emulated GPU only.
#include "cuda/hopper.cuh"

namespace {

struct Toy {
  const bfloat16 *a, *b;
  float* out;
  int64_t span, transposed, registers;
};
struct Memory {
  Shared<bfloat16> a[64 * 64], b[64 * 64];
  Mbarrier here, other;
};

// A matrix (rows, columns) that is copied `wide` columns by `rows` at a time.
TensorMap matrix(const bfloat16* data, int rows, int columns, int wide, int span) {
  return {(char*)data, 2, 2, span, {uint64_t(columns), uint64_t(rows)}, {2, uint64_t(columns) * 2},
          {uint32_t(wide), uint32_t(rows)}};
}
void start_copy(const void* to, const TensorMap& map, int column, int row, Mbarrier& here) {
  machine.start_box(map, {column, row, 0, 0, 0}, (char*)to, &here);
}

__global__ void placed(Toy toy, TensorMap map, int column, int row) {  // what lies where after a copy
  auto& memory = shared_from_1024<Memory>();
  if (threadIdx.x == 0) init(memory.here, 1), announce_barriers();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(memory.here, map.box_bytes());
    start_copy(memory.a, map, column, row, memory.here);
  }
  wait(memory.here, 0);
  for (int e = threadIdx.x; e < 1024; e += 128) store(toy.out + e, __bfloat162float(memory.a[e]));
}

// out (64, 64) = a (64, K) b, of the layouts that `toy` asks for. b: (64, K), or (K, 64) transposed.
__global__ void product(Toy toy, int K, TensorMap of_a, TensorMap of_b) {
  auto& memory = shared_from_1024<Memory>();
  if (threadIdx.x == 0) init(memory.here, 1), announce_barriers();
  __syncthreads();
  int span = toy.span, wide = span ? span / 2 : 8;
  if (threadIdx.x == 0) {
    arrive_and_expect(memory.here, 2 * 64 * K * 2);
    for (int c = 0; c < K; c += wide) start_copy(&memory.a[64 * c], of_a, c, 0, memory.here);
    int rows = toy.transposed ? K : 64, columns = toy.transposed ? 64 : K;
    for (int c = 0; c < columns; c += wide) start_copy(&memory.b[rows * c], of_b, c, 0, memory.here);
  }
  wait(memory.here, 0);

  auto bits = [&](const Shared<bfloat16>* start, int leading, int stride) {
    uint64_t swizzle = span == 128 ? 1 : span == 64 ? 2 : span == 32 ? 3 : 0;
    return uint64_t(shared_address(start) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           swizzle << 62;
  };
  constexpr int UNUSED = 48;  // leading offset, where the swizzle says what it is
  float d[8][4];
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4 * 2;
  machine.fence_registers();
  for (int k = 0; k < K; k += 16) {
    auto two = [&](int r, int c) { return pack(load(toy.a + r * K + k + c), load(toy.a + r * K + k + c + 1)); };
    uint32_t a[4] = {two(row, t), two(row + 8, t), two(row, t + 8), two(row + 8, t + 8)};
    uint64_t of_features = span ? bits(&memory.a[k], UNUSED, 8 * span) : bits(&memory.a[64 * k], 64 * 16, 128);
    uint64_t b = !toy.transposed ? (span ? bits(&memory.b[k], UNUSED, 8 * span) : bits(&memory.b[64 * k], 64 * 16, 128))
                 : span          ? bits(&memory.b[k * wide], K * span, 8 * span)
                                 : bits(&memory.b[k * 8], 128, K * 16);
    machine.start_product(d[0], 64, toy.registers ? a : nullptr, of_features, b, toy.transposed, k > 0, {"toys", 1});
  }
  commit_products();
  wait_for_products(d);
  for (int e = 0; e < 32; ++e) store(toy.out + (row + e / 2 % 2 * 8) * 64 + e / 4 * 8 + t + e % 2, d[e / 4][e % 4]);
}

// One product by the rules. What `kept` guards can be left out, and what `!kept` guards can be done. out: d[0][0].
__global__ void by_the_rules(Toy toy, TensorMap map) {
  auto& memory = shared_from_1024<Memory>();
  bool asks = threadIdx.x == 0;
  if (asks && kept(1)) init(memory.here, 1);
  if (asks) init(memory.other, 4);
  if (asks && !kept(2)) init(memory.here, 1);
  if (asks && kept(3)) announce_barriers();
  if (kept(4)) __syncthreads();
  int bytes = map.box_bytes();
  if (asks) {
    arrive_and_expect(memory.here, kept(5) ? 2 * bytes : 4 * bytes);
    if (!kept(6)) arrive(memory.here);
    start_copy(kept(7) ? &memory.a[0] : &memory.a[64], map, 0, 0, memory.here);
    start_copy(kept(8) ? &memory.b[0] : &memory.a[0] + 128 * 1024, map, 0, 0, memory.here);
    if (!kept(9)) start_copy(&memory.b[0], map, 0, 0, memory.here);
    if (!kept(10)) start_copy(&memory.other, map, 0, 0, memory.here);
  }
  if (!kept(11)) store(toy.out + threadIdx.x, __bfloat162float(memory.a[threadIdx.x]));
  if (kept(12) || threadIdx.x / 32 != 2) wait(memory.here, !kept(13));
  if (!kept(14)) wait(memory.here, 1);

  float d[8][4] = {};
  int begin = kept(15) ? 0 : 64;
  uint64_t bits = descriptor(&memory.a[begin], 16, 1024) | uint64_t(kept(16) ? 0 : 1) << 49;
  if (kept(17)) fence_registers(d);
  if (kept(18) || threadIdx.x < 96) {
    uint64_t own = kept(19) ? bits : bits + threadIdx.x / 32;
    multiply_transposed_async(d, own, descriptor(kept(20) ? memory.b : memory.a + 3 * 4096, 16, 1024), true);
  }
  if (kept(21)) commit_products();
  float early = d[0][0];
  if (!kept(22)) d[1][1] += 1;
  if (kept(23)) wait_for_products(d);
  if (threadIdx.x % 32 == 0) arrive(memory.other);
  bool by_block = toy.registers;  // which barrier says that the products are over
  if (by_block && kept(24)) __syncthreads();
  if (asks) {
    if (!by_block && kept(25)) wait(memory.other, 0);
    arrive_and_expect(memory.here, bytes);
    start_copy(&memory.a[0], map, 0, 0, memory.here);
  }
  if (kept(26)) wait(memory.here, 1);
  store(toy.out + threadIdx.x, kept(27) ? d[0][0] : early);
}

// Two threads take turns by two mbarriers.
__global__ void turns(Toy toy) {
  static int turn;
  auto& memory = shared_from_1024<Memory>();
  if (threadIdx.x == 0) turn = 0, init(memory.here, 1), init(memory.other, 1);
  __syncthreads();
  for (int i = 0; i < 8; ++i) {
    if (threadIdx.x == 0) wait(memory.other, (i & 1) ^ 1), store(toy.out + 2 * i, turn++), arrive(memory.here);
    if (threadIdx.x == 32) wait(memory.here, i & 1), store(toy.out + 2 * i + 1, turn++), arrive(memory.other);
  }
}

// Two groups of products: after the first wait one is over, after the second both.
__global__ void groups(Toy toy, TensorMap map) {
  auto& memory = shared_from_1024<Memory>();
  if (threadIdx.x == 0) init(memory.here, 1), announce_barriers();
  __syncthreads();
  if (threadIdx.x == 0) arrive_and_expect(memory.here, map.box_bytes()), start_copy(memory.a, map, 0, 0, memory.here);
  wait(memory.here, 0);
  float first[8][4], second[8][4];
  uint64_t bits = descriptor(memory.a, 16, 1024);
  fence_registers(first);
  multiply_transposed_async(first, bits, bits, false), commit_products();
  multiply_transposed_async(second, bits, bits, false);
  multiply_transposed_async(second, bits, bits, false), commit_products();  // begins anew: not twice the first
  machine.wait_for_products(1, {"toys", 1});
  store(toy.out + threadIdx.x, first[0][0]), store(toy.out + 128 + threadIdx.x, second[0][0]);
  wait_for_products(second);
  store(toy.out + 256 + threadIdx.x, second[0][0]);
}

// Two copies, each with its mbarrier: who waited for one may not touch what the other brings.
__global__ void another_copy(Toy toy, TensorMap map, bool writes) {
  auto& memory = shared_from_1024<Memory>();
  if (threadIdx.x == 0) init(memory.here, 1), init(memory.other, 1), announce_barriers();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(memory.here, map.box_bytes()), start_copy(memory.a, map, 0, 0, memory.here);
    arrive_and_expect(memory.other, map.box_bytes()), start_copy(memory.b, map, 0, 0, memory.other);
  }
  wait(memory.other, 0);
  auto& touched = kept(1) ? memory.b : memory.a;
  if (writes && threadIdx.x == 0) touched[7] = __float2bfloat16(1);
  if (!writes) store(toy.out + threadIdx.x, __bfloat162float(touched[threadIdx.x]));
  wait(memory.here, 0);
}

}  // namespace

extern "C" int toy(const Toy* toy, int number, int x, int y, void* stream) {
  auto run = [&](auto kernel, auto... rest) {
    return launch(kernel, 1, 128, sizeof(Memory) + 1023, stream, *toy, rest...);
  };
  int span = toy->span;
  TensorMap square = matrix(toy->a, 64, 64, 64, 128);
  if (number == 0) return run(placed, matrix(toy->a, 16, span / 2, span / 2, span), x, y);
  if (number == 1) {
    int K = span ? span / 2 : 16, wide = span ? span / 2 : 8;
    int rows = toy->transposed ? K : 64, columns = toy->transposed ? 64 : K;
    return run(product, K, matrix(toy->a, 64, K, wide, span), matrix(toy->b, rows, columns, wide, span));
  }
  if (number == 2) return run(by_the_rules, square);
  if (number == 3) return run(turns);
  return number == 4 ? run(groups, square) : run(another_copy, square, x);
}

extern "C" void decode(uint64_t bits, int* to) {
  emulator::Descriptor d(bits);
  to[0] = d.start, to[1] = d.leading, to[2] = d.stride, to[3] = d.base, to[4] = d.span;
}
extern "C" const char* refusal(int rank, int64_t address, const int64_t* size, const int64_t* stride, const int* box,
                               int span) {
  TensorMap map{(char*)address, rank, 2, span, {}, {2}, {}};
  for (int d = 0; d < 5; ++d) map.size[d] = size[d], map.stride[d] = d ? stride[d] : 2, map.box[d] = box[d];
  return map.refusal();
}
