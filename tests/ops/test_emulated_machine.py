"""The emulated GPU itself: what it computes, and that it reports what must not be done on a real one."""

import ctypes
import subprocess

import pytest
import torch
from attention_cases import CASES

from minillm.ops import emulate
from minillm.ops.build import build
from minillm.ops.build_plan import EMULATED, SOURCES
from minillm.ops.compilers import find_cxx

KERNELS = r"""
#include "cuda/device.cuh"

namespace {

struct Toy {
  const float* in;
  float* out;
  const bfloat16 *a, *b;
};
struct Memory {
  alignas(16) Shared<float> x[64];
  Shared<bfloat16> tile[16][16], other[16][16];
};

__global__ void neighbours(Toy toy) {  // the element of the next thread
  auto& memory = shared<Memory>();
  memory.x[threadIdx.x] = load(toy.in + threadIdx.x);
  if (kept(1)) __syncthreads();
  store(toy.out + threadIdx.x, memory.x[(threadIdx.x + 1) % 64]);
}
__global__ void neighbours_of_a_warp(Toy toy, int step) {
  auto& memory = shared<Memory>();
  memory.x[threadIdx.x] = load(toy.in + threadIdx.x);
  if (kept(2)) __syncwarp();
  store(toy.out + threadIdx.x, memory.x[threadIdx.x ^ step]);
}
__global__ void overwritten(Toy toy) {  // read, then written by another thread
  auto& memory = shared<Memory>();
  memory.x[threadIdx.x] = load(toy.in + threadIdx.x);
  float mine = memory.x[threadIdx.x];
  if (kept(3)) __syncthreads();
  memory.x[(threadIdx.x + 1) % 64] = mine;
  __syncthreads();
  store(toy.out + threadIdx.x, memory.x[threadIdx.x]);
}
__global__ void divided(Toy) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers(Toy) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void half_a_warp_shuffles(Toy) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(WHOLE_WARP, 1, 1);
}
__global__ void unwritten(Toy toy) { store(toy.out + threadIdx.x, shared<Memory>().x[threadIdx.x]); }
__global__ void beyond_shared(Toy toy) { store(toy.out + threadIdx.x, shared<Memory>().x[threadIdx.x + 2048]); }
__global__ void beyond_global(Toy toy) { store(toy.out + threadIdx.x, load(toy.in + threadIdx.x + 1)); }
__global__ void barriers_of_a_line(Toy) {
  if (threadIdx.x % 32 < 16) { __syncwarp(); } else { __syncthreads(); }
}
__global__ void misaligned_load(Toy toy) { store(toy.out + threadIdx.x, load16(toy.a + threadIdx.x).x); }
__global__ void misaligned_store(Toy toy) { put(reinterpret_cast<uint64_t*>(toy.out + 1), uint64_t{}); }
__global__ void misaligned_pair(Toy toy) { store(toy.out, load_pair(&shared<Memory>().tile[0][1])); }
__global__ void misaligned_chunk(Toy) { store16(&shared<Memory>().tile[0][4], uint4{}); }
__global__ void bytes_of_neighbours(Toy toy) {
  put(reinterpret_cast<uint8_t*>(toy.out) + threadIdx.x, static_cast<uint8_t>(threadIdx.x));
}
__global__ void asserted(Toy) { assert(threadIdx.x < 3); }
__global__ void summed(Toy toy) { atomicAdd(toy.out, load(toy.in + threadIdx.x)); }
__global__ void summed_and_read(Toy toy) {
  atomicAdd(toy.out, 1.f);
  store(toy.out + 1 + threadIdx.x, load(toy.out));
}
__global__ void written_twice(Toy toy) { store(toy.out + threadIdx.x / 2, 1.f); }
__global__ void read_after_write(Toy toy) {
  store(toy.out + threadIdx.x, 1.f);
  __syncthreads();
  load(toy.out + (threadIdx.x + 1) % 64);  // a barrier orders it, but only within the block: we do without
}
__global__ void copies(Toy toy, int shift) {
  auto& memory = shared<Memory>();
  int row = threadIdx.x / 2, half = threadIdx.x % 2 * 8;
  if (row < 16) copy_async(&memory.tile[row][half], toy.a + row * 16 + half + shift, row < 15);
  commit_copies();
  if (row < 16) copy_async(&memory.other[row][half], toy.a, true);
  commit_copies();
  __syncthreads();  // of no use: the copies land after it
  if (kept(4)) wait_for_copies<1>();  // the first group has landed, the second has not
  if (kept(5)) __syncthreads();
  auto& from = kept(6) ? memory.tile : memory.other;
  for (int n = 0; n < 4; ++n) {
    int e = 4 * threadIdx.x + n;
    store(toy.out + e, __bfloat162float(from[e / 16][e % 16]));
  }
}
__global__ void shuffled_after_landing(Toy toy) {  // a shuffle waits for the warp, but does not order its memory
  auto& memory = shared<Memory>();
  int row = threadIdx.x / 2, half = threadIdx.x % 2 * 8;
  copy_async(&memory.tile[row][half], toy.a + row * 16 + half, true);
  commit_copies();
  __syncthreads();
  wait_for_copies<0>();
  __shfl_sync(WHOLE_WARP, row, 0);
  if (kept(7)) __syncwarp();
  store(toy.out + threadIdx.x, __bfloat162float(memory.tile[row ^ 1][half]));
}
__global__ void warp_words(Toy toy) {
  float x = load(toy.in + threadIdx.x), sum = warp_sum(x), max = warp_max(x);
  store(toy.out + threadIdx.x, sum);
  store(toy.out + 64 + threadIdx.x, max);
  store(toy.out + 128 + threadIdx.x, __shfl_sync(WHOLE_WARP, x, 5));
  store(toy.out + 192 + threadIdx.x, float(__ballot_sync(WHOLE_WARP, x > 0) >> 8) + __any_sync(WHOLE_WARP, x > 9));
}
// c (16, 8) = a (16, 16) b (16, 8), the fragments filled by hand as PTX draws them, or by ldmatrix.
__global__ void product(Toy toy, bool by_tiles) {
  auto& memory = shared<Memory>();
  int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
  for (int e = lane; e < 256; e += 32) {
    memory.tile[e / 16][e % 16] = __float2bfloat16(load(toy.a + e));
    memory.other[e / 16][e % 16] = __float2bfloat16(e % 16 < 8 ? load(toy.b + e / 16 * 8 + e % 16) : 0);
  }
  __syncwarp();
  auto a_at = [&](int row, int column) -> bfloat16 { return memory.tile[row][column]; };
  auto b_at = [&](int row) -> bfloat16 { return memory.other[row][g]; };
  uint32_t a[4] = {load_pair(&memory.tile[g][t]), pack(a_at(g + 8, t), a_at(g + 8, t + 1)),
                   load_pair(&memory.tile[g][t + 8]), load_pair(&memory.tile[g + 8][t + 8])};
  uint32_t b[4] = {pack(b_at(t), b_at(t + 1)), pack(b_at(t + 8), b_at(t + 9))};
  if (by_tiles) load_tiles(a, &memory.tile[lane % 16][lane / 16 * 8]);
  if (by_tiles) load_tiles_transposed(b, &memory.other[lane % 16][lane / 16 * 8]);
  float c[4] = {};
  mma(c, a, {b[0], b[1]});
  store(toy.out + g * 8 + t, c[0]), store(toy.out + g * 8 + t + 1, c[1]);
  store(toy.out + (g + 8) * 8 + t, c[2]), store(toy.out + (g + 8) * 8 + t + 1, c[3]);
}
__global__ void turns(Toy toy) {
  static int turn = 0;  // works only here, where threads take turns
  store(toy.out + threadIdx.x, turn++);
}

}  // namespace

extern "C" int toy(const Toy* toy, int number, void* stream) {
  auto run = [&](auto kernel, auto... rest) { return launch(kernel, 1, 64, sizeof(Memory), stream, *toy, rest...); };
  switch (number) {
    case 0: return run(neighbours);
    case 1: return run(neighbours_of_a_warp, 1);
    case 2: return run(neighbours_of_a_warp, 32);
    case 3: return run(overwritten);
    case 4: return run(divided);
    case 5: return run(two_barriers);
    case 6: return run(half_a_warp_shuffles);
    case 7: return run(unwritten);
    case 8: return run(beyond_shared);
    case 9: return run(beyond_global);
    case 19: return launch(shuffled_after_landing, 1, 32, sizeof(Memory), stream, *toy);
    case 17: return run(written_twice);
    case 18: return run(read_after_write);
    case 10: return run(copies, 0);
    case 11: return run(copies, 1);
    case 12: return run(warp_words);
    case 13: return launch(product, 1, 32, sizeof(Memory), stream, *toy, false);
    case 14: return launch(product, 1, 32, sizeof(Memory), stream, *toy, true);
    case 15: return run(turns);
    case 16: return launch(neighbours, 1, 48, sizeof(Memory), stream, *toy);
    case 20: return run(barriers_of_a_line);
    case 21: return run(misaligned_load);
    case 22: return run(misaligned_store);
    case 23: return run(misaligned_pair);
    case 24: return run(misaligned_chunk);
    case 25: return run(bytes_of_neighbours);
    case 26: return run(summed);
    case 27: return run(summed_and_read);
    case 28: return run(asserted);
    default: return launch(neighbours, 1, 64, 300 * 1024, stream, *toy);
  }
}
extern "C" void round_all(const float* from, bfloat16* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = __float2bfloat16(from[i]);
}
"""
NAMES = (
    *("neighbours", "neighbours_of_a_warp", "neighbours_of_another_warp", "overwritten", "divided", "two_barriers"),
    *("half_a_warp_shuffles", "unwritten", "beyond_shared", "beyond_global", "copies", "misaligned_copies"),
    *("warp_words", "product", "product_by_tiles", "turns", "part_of_a_warp", "written_twice"),
    *("read_after_write", "shuffled_after_landing", "barriers_of_a_line", "misaligned_load", "misaligned_store"),
    *("misaligned_pair", "misaligned_chunk", "bytes_of_neighbours", "summed", "summed_and_read", "asserted"),
    "too_much_shared",
)  # in the order of `toy`'s cases


class Toy(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("in_", "out", "a", "b")]


@pytest.fixture(scope="module", params=["", "MINILLM_PORTABLE_FIBERS"], ids=["fibers", "portable fibers"])
def toys(request, tmp_path_factory):
    """The toy kernels, with each of the two ways to switch fibers."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.cu").write_text(KERNELS)
    flags = [*EMULATED, "-shared", *([f"-D{request.param}"] if request.param else [])]
    command = [*find_cxx().command, *flags, "-Werror", "-o", str(folder / "toys.so"), str(folder / "toys.cu")]
    subprocess.run(command, cwd=SOURCES, check=True)
    return folder / "toys.so"


def run(toys, name, *, size=64, a=None, b=None, **settings):
    x, out = torch.randn(64, generator=torch.Generator().manual_seed(1)), torch.zeros(size)
    a, b = (torch.zeros(256, dtype=torch.bfloat16) if t is None else t.contiguous() for t in (a, b))
    machine = emulate.Machine(path=toys, **settings)
    toy = Toy(*(t.data_ptr() for t in (x, out, a, b)))
    machine.call("toy", toy, NAMES.index(name), memory=[x, out, a, b])
    return x, out, machine


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_threads_talk_through_shared_memory(toys, schedule):
    x, out, machine = run(toys, "neighbours", schedule=schedule, seed=3)
    assert torch.equal(out, x.roll(-1))
    counts = machine.counts
    assert (counts.global_read, counts.global_written) == (256, 256)
    assert (counts.shared_read, counts.shared_written, counts.barriers) == (256, 256, 1)
    assert torch.equal(run(toys, "neighbours_of_a_warp", schedule=schedule)[1], x.view(32, 2).flip(1).flatten())
    assert torch.equal(run(toys, "overwritten", schedule=schedule)[1], x.roll(1))
    run(toys, "shuffled_after_landing", schedule=schedule)


def test_neighbours_may_write_neighbouring_bytes(toys):
    out = run(toys, "bytes_of_neighbours", size=16)[1]
    assert out.view(torch.uint8).tolist() == list(range(64))


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_atomics_do_not_race_with_each_other(toys, schedule):
    x, out, machine = run(toys, "summed", size=1, schedule=schedule)
    torch.testing.assert_close(out[0], x.sum())
    assert (machine.counts.global_read, machine.counts.global_written) == (512, 256)


@pytest.mark.parametrize(
    "line, message",
    [
        ("Shared<uint8_t> x; void f() { x = 1; }", "watches shared memory two bytes at a time"),
        ("void f(Shared<float>* x) { atomicAdd(x, 1.f); }", "knows atomics of global memory alone"),
    ],
)
def test_what_the_machine_cannot_watch_does_not_compile(tmp_path, line, message):
    (tmp_path / "bad.cu").write_text(f'#include "cuda/device.cuh"\n{line}\n')
    command = [*find_cxx().command, *EMULATED, "-fsyntax-only", str(tmp_path / "bad.cu")]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode and message in done.stderr


def test_schedules_are_what_they_say(toys):
    orders = {}
    for schedule, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        out = run(toys, "turns", schedule=schedule, seed=seed)[1]
        orders[schedule, seed] = (out - out.min()).tolist()
    ascending = [float(i) for i in range(64)]
    assert orders["forward", 0] == ascending and orders["reverse", 0] == ascending[::-1]
    assert len({tuple(order) for order in orders.values()}) == 4


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize(
    "name, mutant, message",
    [
        (
            "neighbours",
            1,
            r"race: thread \d+ of block 0 (reads|writes) byte \d+ of shared memory that thread \d+ (wrote|read)",
        ),
        ("neighbours_of_a_warp", 2, "race: .* with no barrier between"),
        ("neighbours_of_another_warp", 0, "race: "),
        ("overwritten", 3, "race: "),
        ("divided", 0, r"divergent barrier: thread \d+ waits at toys.cu:\d+, but thread \d+ has left the kernel"),
        ("two_barriers", 0, r"divergent barrier: thread \d+ waits at toys.cu:\d+, thread \d+ at toys.cu:\d+"),
        ("half_a_warp_shuffles", 0, "divergent barrier: .* has left the kernel"),
        ("barriers_of_a_line", 0, "divergent barrier: thread .* waits at .* others at another barrier of this line"),
        ("beyond_shared", 0, r"thread \d+ of block 0 reads shared memory outside the block's \d+ bytes"),
        ("written_twice", 0, "race: .* writes global memory that thread"),
        ("read_after_write", 0, "race: .* reads global memory that thread"),
        ("beyond_global", 0, r"thread 63 of block 0 reads 4 bytes of global memory outside every tensor"),
        ("copies", 4, "while an asynchronous copy to it is under way"),
        ("copies", 5, "race: |copy to it is under way"),
        ("copies", 6, "while an asynchronous copy to it is under way"),
        ("shuffled_after_landing", 7, "race: "),
        ("misaligned_copies", 0, "moves 16 bytes at an address between"),
        ("misaligned_load", 0, "thread .* of block 0 moves 16 bytes at an address between"),
        ("misaligned_store", 0, "moves 8 bytes at an address between"),
        ("misaligned_pair", 0, "moves 4 bytes at an address between"),
        ("misaligned_chunk", 0, "moves 16 bytes at an address between"),
        ("summed_and_read", 0, "race: .* reads global memory that an atomic wrote"),
        ("asserted", 0, r"assertion failed at .*toys.cu:\d+: threadIdx.x < 3"),
        ("part_of_a_warp", 0, "cudaError 9"),
    ],
)
def test_what_must_not_be_done_is_reported(toys, name, mutant, message, schedule):
    with pytest.raises(emulate.EmulationError, match=message):
        run(toys, name, size=256, mutant=mutant, schedule=schedule)
    run(toys, "neighbours")  # the machine goes on


def test_more_shared_memory_than_a_block_has_is_refused(toys):
    with pytest.raises(ValueError, match="does not take this shape"):
        run(toys, "too_much_shared")


def test_shared_memory_begins_as_nan(toys):
    assert run(toys, "unwritten")[1].isnan().all()


def test_asynchronous_copies_land_when_waited_for(toys):
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = run(toys, "copies", a=a, size=256)[1].view(16, 16)
    assert torch.equal(out[:15], a[:15].float()) and (out[15] == 0).all()


def test_words_of_a_warp(toys):
    x, out, machine = run(toys, "warp_words", size=256)
    sums, largest, fifth, votes = out.view(4, 2, 32)
    x = x.view(2, 32)
    torch.testing.assert_close(sums, x.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(largest, x.amax(1, keepdim=True).expand(2, 32))
    assert torch.equal(fifth, x[:, 5:6].expand(2, 32))
    bits = [sum(1 << lane for lane in range(8, 32) if row[lane] > 0) >> 8 for row in x.tolist()]
    assert votes[:, 0].tolist() == bits
    assert machine.counts.shuffles == 64 * (5 + 5 + 1 + 1 + 1)


@pytest.mark.parametrize("name", ["product", "product_by_tiles"])
def test_tensor_cores_multiply(toys, name):
    random = torch.Generator().manual_seed(4)
    a, b = (torch.randn(16, columns, generator=random).bfloat16() for columns in (16, 8))
    _, out, machine = run(toys, name, a=a, b=b, size=128)
    torch.testing.assert_close(out.view(16, 8).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert machine.counts.mma == 1


def test_bfloat16_rounds_as_torch_does(toys):
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15  # halfway between two bfloat16
    x = torch.cat([bits, ties]).view(torch.float32)
    ours = torch.empty(len(x), dtype=torch.bfloat16)
    emulate.library(toys).round_all(*(ctypes.c_void_p(t.data_ptr()) for t in (x, ours)), len(x))
    theirs = x.bfloat16()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~ours.isnan()])


def test_portable_fibers_give_the_same_numbers():
    library = build("emulated", defines=("MINILLM_PORTABLE_FIBERS",), only=("attention_v4.cu",))
    case = CASES["padding left"]
    q, k, v, _ = case.tensors(torch.bfloat16)
    o, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    keys = case.keys()
    rules = case.rules() | {"keys": keys}
    arguments, memory = emulate._arguments(q, k, v, o, lse, **rules)
    emulate.Machine(path=library).call("minillm_attention_v4", arguments, memory=memory)
    ours = emulate.attention(q, k, v, stage="v4", **rules)
    assert torch.equal(o, ours[0]) and torch.equal(lse, ours[1])
