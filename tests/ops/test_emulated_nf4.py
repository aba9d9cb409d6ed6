"""The CUDA kernels of NF4, run on the emulated GPU.

Their codes and numbers are those of the torch path, bit by bit; products have at most twice its error.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from mutants import NEEDLESS, OUTSIDE, RACE, WRONG, check_killed
from torch import Tensor

from minillm.ops import emulate
from minillm.ops.build import build
from minillm.ops.build_plan import SOURCES
from minillm.ops.int4 import Int4Tensor, int4_dequantize, quantize_int4
from minillm.ops.quantize import NF4, QuantTensor, nf4_dequantize, nf4_quantize, pairs, quantize_nf4
from minillm.ops.structures import structures

FILES = sorted((SOURCES / "cuda").glob("nf4*.cu*"))
Nf4, Nf4Quantize, Nf4Dequantize, Nf4Linear = map(
    structures("nf4.h").get, ("Nf4", "Nf4Quantize", "Nf4Dequantize", "Nf4Linear")
)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of the error, relative: where torch's is 0 by luck
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SCHEDULES = pytest.mark.parametrize("schedule", emulate.SCHEDULES)


@functools.cache
def library() -> Path:
    return build("emulated", only=tuple(file.name for file in FILES if file.suffix == ".cu"))


def machine_of(**settings) -> emulate.Machine:
    return emulate.Machine(path=library(), **settings)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def weight_of(weight: QuantTensor | Int4Tensor) -> tuple[Nf4, list[Tensor]]:
    """The argument, and its memory."""
    if isinstance(weight, Int4Tensor):
        codes, scale, zero, book, shape = weight
        tensors, block = (codes, scale, None, None, None, book, zero), weight.group
    else:
        codes, absmax, absmax2, offset, book, book8, shape = weight
        tensors, block = (codes, absmax, absmax2, offset, book8, book, None), weight.block
    count = torch.Size(shape).numel()
    return Nf4(*map(pointer, tensors), count, block), [t for t in tensors if t is not None]


def example(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight that begins with some zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    weight.view(-1)[:64] = 0
    return weight


def quantize(weight: Tensor, block: int, stage: int, machine: emulate.Machine) -> tuple[Tensor, Tensor]:
    blocks = -(-weight.numel() // block)
    codes, absmax = torch.full((blocks, block // 2), 255, dtype=torch.uint8), torch.full((blocks,), torch.nan)
    book = pairs(NF4, weight.device)
    arguments = Nf4Quantize(
        *map(pointer, (weight, codes, absmax, book)), weight.numel(), emulate.DTYPES[weight.dtype], block
    )
    machine.call("minillm_nf4_quantize", arguments, stage, memory=[weight, codes, absmax, book])
    return codes, absmax


def check_quantize(
    stage: int, machine: emulate.Machine, count: int = 700, block: int = 64, dtype=torch.float32
) -> None:
    weight = example(count, dtype=dtype)
    expected = nf4_quantize.implementations["reference"](weight, block)
    for ours, theirs in zip(quantize(weight, block, stage, machine), expected, strict=True):
        assert torch.equal(ours, theirs)


@SCHEDULES
@DTYPES
@pytest.mark.parametrize("count, block", [(1, 2), (700, 64), (701, 6), (300, 256), (0, 64), (1025, 2), (128, 64)])
@pytest.mark.parametrize("stage", [1, 2, 0])
def test_the_codes_are_those_of_the_torch_path(stage, count, block, dtype, schedule):
    check_quantize(stage, machine_of(schedule=schedule), count, block, dtype)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_midpoint_goes_to_the_lower_value(stage):
    book = torch.tensor(NF4)
    middle = (book[1:] + book[:-1]) / 2
    weight = torch.cat([middle, middle.nextafter(torch.ones(())), torch.ones(1), -torch.ones(1)])
    codes, _ = quantize(weight, 32, stage, machine_of())
    found = torch.stack([codes >> 4, codes & 15], -1).flatten()
    assert found.tolist() == [*range(15), *range(1, 16), 15, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_cannot_be_quantized_shows_in_the_scale(stage, bad):
    weight = example(200)
    weight[150] = bad
    _, absmax = quantize(weight, 64, stage, machine_of())
    assert absmax.isfinite().tolist() == [True, True, False, True]


def dequantize(weight: QuantTensor | Int4Tensor, dtype: torch.dtype, stage: int, machine: emulate.Machine) -> Tensor:
    argument, memory = weight_of(weight)
    out = torch.full(weight.shape, torch.nan, dtype=dtype)
    arguments = Nf4Dequantize(argument, pointer(out), emulate.DTYPES[dtype])
    machine.call("minillm_nf4_dequantize", arguments, stage, memory=[*memory, out])
    return out


def check_dequantize(
    stage: int, machine: emulate.Machine, count: int = 700, block: int = 64, double: bool = True, dtype=torch.float32
) -> None:
    weight = quantize_nf4(example(count), block=block, double=double)
    expected = nf4_dequantize.implementations["reference"](weight, dtype)
    assert torch.equal(dequantize(weight, dtype, stage, machine), expected)


@DTYPES
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    "stage, count, block",
    [
        (1, 1, 2),
        (1, 701, 6),
        (1, 700, 64),
        (2, 700, 64),
        (2, 1, 8),
        (2, 4101, 8),
        (2, 40000, 128),
        (0, 50, 6),
        (0, 99, 64),
    ],
)
def test_the_numbers_are_those_of_the_torch_path(stage, count, block, double, dtype):
    check_dequantize(stage, machine_of(schedule=emulate.SCHEDULES[count % 3]), count, block, double, dtype)


@DTYPES
@pytest.mark.parametrize("stage, group", [(1, 6), (1, 32), (2, 8), (2, 32), (0, 6), (0, 96)])
def test_whole_numbers_are_those_of_the_torch_path(stage, group, dtype):
    weight = quantize_int4(example(7, 96) + 0.3, group=group)
    expected = int4_dequantize.implementations["reference"](weight, dtype)
    assert torch.equal(dequantize(weight, dtype, stage, machine_of(schedule=emulate.SCHEDULES[group % 3])), expected)


def check_linear(
    stage: int,
    machine: emulate.Machine,
    M: int = 3,
    Din: int = 96,
    Dout: int = 37,
    block: int = 64,
    double: bool = True,
    bias: bool = True,
    strided: bool = False,
    whole: bool = False,
    dtype=torch.float32,
) -> None:
    """`whole`: a weight in whole numbers, whose groups are the blocks."""
    random = torch.Generator().manual_seed(M)
    if whole:
        weight = quantize_int4(example(Dout, Din) + 0.3, group=block)
    else:
        weight = quantize_nf4(example(Dout, Din), block=block, double=double)
    x = torch.randn(M, Din + 3 * strided, generator=random).to(dtype)[:, :Din]
    b = torch.randn(Dout, generator=random).to(dtype) if bias else None
    y = torch.full((M, Dout), torch.nan, dtype=dtype)
    argument, memory = weight_of(weight)
    arguments = Nf4Linear(
        *(argument, *map(pointer, (x, b, y)), x.stride(0), y.stride(0), emulate.DTYPES[dtype], M, Din, Dout)
    )
    machine.call("minillm_nf4_linear", arguments, stage, memory=[t for t in (*memory, x, b, y) if t is not None])
    if not M:
        return
    by = (int4_dequantize if whole else nf4_dequantize).implementations["reference"]
    exact = F.linear(x.double(), by(weight, torch.float64), None if b is None else b.double())
    theirs = F.linear(x, by(weight, dtype), b)
    error, their_error = ((t.double() - exact).abs().max() for t in (y, theirs))
    allowed = 2 * their_error + ROUNDING[dtype] * (1 + exact.abs().max())
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


LINEAR = {
    "few": {},
    "one row": {"M": 1, "Din": 64, "Dout": 16},
    "two rows": {"M": 2, "Din": 32, "Dout": 33, "bias": False},
    "five rows": {"M": 5, "Din": 96, "Dout": 21, "double": False},
    "eight rows": {"M": 8, "Din": 1120, "Dout": 5, "block": 32},
    "rows of x between 16 bytes": {"M": 3, "Din": 64, "strided": True},
    "one output": {"M": 1, "Din": 32, "Dout": 1},
    "no row": {"M": 0},
    "whole numbers": {"M": 3, "Din": 192, "Dout": 7, "block": 32, "whole": True},
    "one group of whole numbers": {"M": 1, "Din": 64, "Dout": 5, "block": 64, "whole": True},
}
ODD = {
    "odd sizes": {"M": 3, "Din": 37, "Dout": 29, "block": 6},
    "many rows": {"M": 20, "Din": 10, "Dout": 3},
    "one number": {"M": 1, "Din": 1, "Dout": 1, "block": 2},
    "odd groups of whole numbers": {"M": 3, "Din": 30, "Dout": 5, "block": 6, "whole": True},
}


@DTYPES
@pytest.mark.parametrize(
    "stage, name",
    [*((stage, name) for stage in (1, 2, 0) for name in LINEAR), *((s, name) for s in (1, 0) for name in ODD)],
)
def test_the_product_is_the_formula(stage, name, dtype):
    case = (LINEAR | ODD)[name]
    machine = machine_of(schedule=emulate.SCHEDULES[(len(name) + stage) % 3])
    check_linear(stage, machine, **case, dtype=dtype)


def test_the_order_of_threads_changes_no_bit():
    """Which the comparison with exact codes above shows for all but the product."""
    weight, x = quantize_nf4(example(9, 1056)), torch.randn(2, 1056)
    answers = []
    for schedule in emulate.SCHEDULES:
        y = torch.full((2, 9), torch.nan)
        argument, memory = weight_of(weight)
        arguments = Nf4Linear(argument, pointer(x), None, pointer(y), 1056, 9, 0, 2, 1056, 9)
        machine_of(schedule=schedule).call("minillm_nf4_linear", arguments, 2, memory=[*memory, x, y])
        answers.append(y)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: check_linear(2, machine_of(), M=9),
        lambda: check_linear(2, machine_of(), Din=40),
        lambda: check_linear(2, machine_of(), block=16),
        lambda: check_linear(3, machine_of()),
        lambda: check_dequantize(2, machine_of(), block=6),
        lambda: check_dequantize(3, machine_of()),
        lambda: check_quantize(3, machine_of()),
        lambda: check_quantize(-1, machine_of()),
    ],
)
def test_what_a_stage_does_not_take_is_refused(call):
    with pytest.raises(ValueError, match="does not take this shape"):
        call()


def test_bytes_are_those_of_the_algorithm():
    """Of 9 outputs, 1024 codes each, stage 2's three warps read 4 rows each (the last, one row four times), 4 bytes of
    scale for each 32 codes, 16 numbers of the table, x for each warp, and the bias. Stage 1 reads a scale, a value, a
    byte and a number for each code.
    """

    def bytes_read(stage: int) -> int:
        machine = machine_of()
        check_linear(stage, machine, M=1, Din=1024, Dout=9, double=False)
        return machine.counts.global_read

    assert bytes_read(2) == 12 * (1024 // 2 + 1024 // 32 * 4) + 3 * 1024 * 4 + 16 * 4 + 9 * 4
    assert bytes_read(1) == 9 * (1024 * (4 + 4 + 1 + 4) + 4)


class Mutant(NamedTuple):
    without: str
    killer: str
    check: Callable[..., None]
    stage: int
    case: dict | None = None


MUTANTS = {
    # nf4.cuh
    1201: Mutant("barrier: the table is not used before it is there", RACE, check_dequantize, 2),
    # nf4_quantize.cu
    1211: Mutant("a block of zeros is not divided by 0", WRONG, check_quantize, 2),
    1212: Mutant("of the last block, weights with even numbers after its end are not read", OUTSIDE, check_quantize, 1),
    1213: Mutant("nor those with odd numbers", OUTSIDE, check_quantize, 1),
    1214: Mutant("a thread after the last block does nothing", OUTSIDE, check_quantize, 1),
    1215: Mutant("a warp after the last block does nothing", OUTSIDE, check_quantize, 2),
    # nf4_dequantize.cu
    1221: Mutant("the first number after the last is not written", OUTSIDE, check_dequantize, 1),
    1222: Mutant("nor the second", OUTSIDE, check_dequantize, 1, {"count": 701, "block": 6}),
    1223: Mutant("a thread after the last number does nothing", OUTSIDE, check_dequantize, 2),
    1224: Mutant("eight numbers are written at once only where there are eight", OUTSIDE, check_dequantize, 2),
    1225: Mutant("numbers after the last are not written", OUTSIDE, check_dequantize, 2),
    # nf4_linear.cu
    1231: Mutant("a thread after the last output does nothing", OUTSIDE, check_linear, 1),
    1232: Mutant("a warp after the last output reads nothing", NEEDLESS, check_linear, 2),
    1233: Mutant("outputs after the last are not read", OUTSIDE, check_linear, 2),
    1234: Mutant("rows of x after the last are not read", OUTSIDE, check_linear, 2),
    1235: Mutant("outputs after the last are not written", OUTSIDE, check_linear, 2, LINEAR["one output"]),
    1236: Mutant("rows of y after the last are not written", OUTSIDE, check_linear, 2),
}


@pytest.mark.parametrize("number", MUTANTS)
def test_a_mutant_is_killed(number):
    _, killer, check, stage, case = MUTANTS[number]
    check_killed(number, killer, lambda machine: check(stage, machine, **(case or {})), library())
