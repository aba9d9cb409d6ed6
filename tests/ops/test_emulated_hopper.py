"""What the emulated GPU knows of Hopper: where the copy engine and the tensor cores look for a number, when a copy or a
product is over, and what must not be done meanwhile."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from minillm.ops import emulate
from minillm.ops.build_plan import EMULATED, SOURCES
from minillm.ops.compilers import find_cxx

NAMES = ("placed", "product", "by_the_rules", "turns", "groups", "another_copy")


class Toy(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "out")),
        *((name, ctypes.c_int64) for name in ("span", "transposed", "registers")),
    ]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    library = tmp_path_factory.mktemp("toys") / "toys.so"
    source = Path(__file__).with_name("hopper_toys.cu")
    command = [*find_cxx().command, *EMULATED, "-Werror", "-shared", "-o", str(library), str(source)]
    subprocess.run(command, cwd=SOURCES, check=True)
    return library


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def run(toys, name, *, a=None, b=None, size=1024, span=128, transposed=0, registers=0, x=0, y=0, **settings):
    a, b = (draw(64, 64) if t is None else t.contiguous() for t in (a, b))
    out, machine = torch.zeros(size), emulate.Machine(path=toys, **settings)
    toy = Toy(*(t.data_ptr() for t in (a, b, out)), span, transposed, registers)
    machine.call("toy", toy, NAMES.index(name), x, y, memory=[a, b, out])
    return out, machine


# Of each line of 128 bytes which chunk lies where: PTX ISA's pictures of the swizzling modes.
PATTERNS = {
    128: ("01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"),
    64: ("01234567", "10325476", "23016745", "32107654"),
    32: ("01234567", "10325476"),
}


@pytest.mark.parametrize("span", PATTERNS)
def test_a_copy_is_swizzled_as_the_manual_draws_it(toys, span):
    chunks = torch.arange(16 * span // 16)  # 16 rows of `span` bytes
    out, machine = run(toys, "placed", span=span, a=chunks.repeat_interleave(8).bfloat16())
    lines = out[: len(chunks) * 8].view(-1, 8, 8)  # of 8 chunks of 8 numbers
    for number, line in enumerate(lines.tolist()):
        pattern = PATTERNS[span][number % len(PATTERNS[span])]
        assert [chunk[0] for chunk in line] == [8 * number + int(place) for place in pattern]
        assert all(len(set(chunk)) == 1 for chunk in line)
    assert (machine.counts.global_read, machine.counts.shared_written) == (16 * span, 16 * span)


@pytest.mark.parametrize("column, row", [(0, 3), (0, -2), (16, 0), (-8, 5), (0, 16), (5, 0), (-3, -1)])
def test_a_copy_is_zero_outside_the_tensor(toys, column, row):
    a = draw(16, 16) + 9
    out, machine = run(toys, "placed", span=32, a=a, x=column, y=row)
    swizzled = out[:256].view(4, 8, 8)
    plain = torch.stack([line[[int(c) for c in PATTERNS[32][n % 2]]] for n, line in enumerate(swizzled)]).view(16, 16)
    wide = torch.zeros(64, 64)
    wide[24:40, 24:40] = a.float()  # the tensor in the middle of zeros
    expected = wide[24 + row : 40 + row, 24 + column : 40 + column]
    assert torch.equal(plain, expected)
    assert machine.counts.global_read == 2 * (expected != 0).sum()


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_a_product_reads_each_layout(toys, span, transposed, registers, schedule):
    K = span // 2 or 16
    a, b = draw(64, K), draw(K, 64)
    given = {"a": a, "b": b if transposed else b.mT, "transposed": transposed, "registers": registers}
    out, machine = run(toys, "product", span=span, size=64 * 64, schedule=schedule, seed=1, **given)
    torch.testing.assert_close(out.view(64, 64).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert machine.counts.mma == K // 16 * 4 * 64 // 8


@pytest.mark.parametrize(
    "bits, expected",
    [
        (0x4000_0040_0001_0080, [0x800, 16, 1024, 0, 128]),
        (0x8000_0020_0400_0001, [16, 16384, 512, 0, 64]),
        (0xC00A_3FFF_3FFF_3FFF, [0x3FFF0, 0x3FFF0, 0x3FFF0, 5, 32]),
        (0x0000_0008_0040_C000, [0, 1024, 128, 0, 0]),
    ],
)
def test_a_descriptor_is_read_bit_by_bit(toys, bits, expected):
    found = (ctypes.c_int * 5)()
    emulate.library(toys).decode(ctypes.c_uint64(bits), found)
    assert list(found) == expected


def test_products_are_over_group_by_group(toys):
    a = draw(64, 64)
    first, second, both = run(toys, "groups", a=a, size=384)[0].view(3, 128)
    exact = (a[:, :16].double() @ a[:, :16].double().mT).float()  # one product sums over 16
    rows = [16 * (thread // 32) + thread % 32 // 4 for thread in range(128)]
    expected = torch.stack([exact[row, thread % 4 * 2] for thread, row in enumerate(rows)])
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert second.isnan().all() and torch.equal(both, first)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_mbarriers_let_threads_take_turns(toys, schedule):
    out, _ = run(toys, "turns", size=16, schedule=schedule, seed=2)
    assert out.tolist() == list(range(16))


def test_a_result_that_is_read_too_early_is_nan(toys):
    assert run(toys, "by_the_rules", mutant=27)[0][:128].isnan().all()
    assert run(toys, "by_the_rules")[0].isfinite().all()


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize(
    "mutant, message",
    [
        (1, "uses an mbarrier that was never made"),
        (2, "thread 0 of block 0 makes an mbarrier where there is one"),
        (3, "copies to an mbarrier that the engine was not told of"),
        (4, r"race: thread \d+ of block 0 uses an mbarrier that thread 0 made, with no barrier between|never made"),
        (5, r"deadlock: thread \d+ waits at hopper_toys.cu:\d+ for an mbarrier that misses 0 arrivals and 16384 bytes"),
        (6, "arrives at an mbarrier that misses no arrival in this phase"),
        (7, "copies a box to an address that is no multiple of 1024"),
        (8, "copies a box to outside the block's shared memory"),
        (9, "race: thread 0 of block 0 copies over byte .* before an earlier copy"),
        (10, "copies a box to outside the block's shared memory"),
        (11, "reads byte .* of shared memory while an asynchronous copy to it is under way"),
        (12, "race: warp 2 multiplies byte .* and did not wait for the mbarrier of its copy|copy to it is under way"),
        (13, "thread .* multiplies byte .* while an asynchronous copy to it is under way|leaves|deadlock"),
        (14, "deadlock: .* misses 1 arrivals and 0 bytes"),
        (15, "should have a start in the first row of the swizzle's pattern"),
        (16, "should have a base offset of 0"),
        (17, "starts a product, and no fence orders its registers before it"),
        (18, "divergent barrier: thread|deadlock: .* misses 1 arrivals and 0 bytes"),
        (19, "multiplies by other descriptors"),
        (20, "multiplies byte .* of shared memory, which no copy fills|outside the block's shared memory"),
        (21, "leaves while its product is under way|race: thread 0"),
        (22, r"thread \d+ of block 0 touched registers of a product under way"),
        (23, "race: thread 0 of block 0 copies over byte .* that warp \\d may still multiply"),
        (25, "race: thread 0 of block 0 copies over byte .* that warp \\d may still multiply"),
        (26, "block 0 ends while a copy to its shared memory is under way"),
    ],
)
def test_what_must_not_be_done_is_reported(toys, mutant, message, schedule):
    with pytest.raises(emulate.EmulationError, match=message):
        run(toys, "by_the_rules", mutant=mutant, schedule=schedule)
    run(toys, "by_the_rules")  # the machine goes on


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("writes", [0, 1])
def test_who_waits_for_one_copy_may_not_touch_another(toys, writes, schedule):
    run(toys, "another_copy", x=writes, schedule=schedule)
    message = "race: .* did not wait for the mbarrier of its copy|while an asynchronous copy to it is under way"
    with pytest.raises(emulate.EmulationError, match=message):
        run(toys, "another_copy", x=writes, schedule=schedule, mutant=1)


def test_a_barrier_of_the_block_orders_products_and_copies_too(toys):
    run(toys, "by_the_rules", registers=1)
    with pytest.raises(emulate.EmulationError, match="race: thread 0 of block 0 copies over byte"):
        run(toys, "by_the_rules", registers=1, mutant=24)


GOOD = {"rank": 4, "address": 64, "size": [64, 5, 3, 2, 1], "stride": [2, 128, 1024, 4096, 0], "box": [64, 8, 1, 1, 1]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"rank": 0}, "a rank of 1 to 5"),
        ({"rank": 6}, "a rank of 1 to 5"),
        ({"address": 72}, "an address that is a multiple of 16"),
        ({"box": [12, 8, 1, 1, 1]}, "rows of a multiple of 16 bytes"),
        ({"box": [128, 8, 1, 1, 1]}, "no longer than the swizzle's span"),
        ({"box": [64, 257, 1, 1, 1]}, "boxes of 1 to 256"),
        ({"box": [64, 0, 1, 1, 1]}, "boxes of 1 to 256"),
        ({"size": [64, 0, 3, 2, 1]}, "sizes of 1 to 2"),
        ({"size": [64, 2**32 + 1, 3, 2, 1]}, "sizes of 1 to 2"),
        ({"stride": [2, 136, 1024, 4096, 0]}, "strides that are a multiple of 16"),
        ({"stride": [2, 128, 2**40, 4096, 0]}, "less than 2^40"),
    ],
)
def test_a_tensor_map_keeps_the_rules_of_the_driver(toys, change, message):
    given = GOOD | change
    refusal = emulate.library(toys).refusal
    refusal.restype = ctypes.c_char_p
    long, integer = ctypes.c_int64 * 5, ctypes.c_int * 5
    lists = long(*given["size"]), long(*given["stride"]), integer(*given["box"])
    found = refusal(given["rank"], ctypes.c_int64(given["address"]), *lists, 128)
    assert (found is None) == (message is None) and (message is None or message in found.decode())
