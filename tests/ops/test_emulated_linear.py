"""The CUDA kernels of a linear layer for few rows, on the emulated GPU, against the formula in float64."""

import ctypes
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from mutants import OUTSIDE, OUTSIDE_SHARED, RACE, check_killed
from torch import Tensor

from minillm.ops import emulate
from minillm.ops.build import build, obstacle
from minillm.ops.build_plan import SOURCES

pytestmark = pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
SOURCE = SOURCES / "cuda" / "linear.cu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
STAGES = (1, 2, 0)


class Linear(ctypes.Structure):  # csrc/linear.h
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("x_row", "weight_row", "y_row")),
        *((name, ctypes.c_void_p) for name in "ab"),
        *((name, ctypes.c_int64) for name in ("a_row", "b_row")),
        *((name, ctypes.c_int32) for name in ("dtype", "factor_dtype", "M", "Din", "Dout", "R")),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def library() -> Path:
    return build("emulated", only=("linear.cu",))


def machine_of(**settings) -> emulate.Machine:
    return emulate.Machine(path=library(), **settings)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stage: int, machine: emulate.Machine, R: int = 0) -> Tensor:
    (M, Din), Dout = x.shape, len(weight)
    y = torch.full((M, Dout), torch.nan, dtype=x.dtype)
    pointers = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    dtype = emulate.DTYPES[x.dtype]
    call = Linear(*pointers, *(t.stride(0) for t in (x, weight, y)), *[None] * 2, 0, 0, dtype, dtype, M, Din, Dout, R)
    machine.call("minillm_linear", call, stage, memory=[t for t in (x, weight, bias, y) if t is not None])
    return y


class Case(NamedTuple):
    M: int = 3
    Din: int = 200
    Dout: int = 21
    bias: bool = True
    beside: int = 0  # numbers between the rows of x and of the weight
    before: int = 0  # and before the first

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(self.Din)

        def rows(count: int) -> Tensor:
            room = torch.randn(count, self.before + self.Din + self.beside, generator=random).to(dtype)
            return room[:, self.before : self.before + self.Din]

        bias = torch.randn(self.Dout, generator=random).to(dtype) if self.bias else None
        return rows(self.M), rows(self.Dout), bias


CASES = {
    "few": Case(),
    "one row": Case(M=1, Din=64, Dout=16, bias=False),
    "two rows": Case(M=2, Din=8, Dout=3),
    "four rows": Case(M=4, Din=1032, Dout=9),
    "long rows": Case(M=1, Din=3000, Dout=18),
    "odd features": Case(M=3, Din=131, Dout=7),
    "one number": Case(M=1, Din=1, Dout=1),
    "no feature": Case(M=2, Din=0, Dout=5),
    "no output": Case(M=2, Din=8, Dout=0),
    "whole rows apart": Case(M=4, Din=48, Dout=6, beside=16, before=8),
    "rows between 16 bytes": Case(M=4, Din=48, Dout=6, beside=3),
    "a start between 16 bytes": Case(M=1, Din=40, Dout=6, beside=7, before=1),
}


def check(case: Case, stage: int, machine: emulate.Machine, dtype: torch.dtype = torch.bfloat16) -> None:
    """At most twice the error of torch's product in the same dtype, or a rounding of the result."""
    x, weight, bias = case.tensors(dtype)
    y = run(x, weight, bias, stage, machine)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if exact.numel():
        error, theirs = ((t.double() - exact).abs().max() for t in (y, F.linear(x, weight, bias)))
        allowed = 2 * theirs + torch.finfo(dtype).eps * (1 + exact.abs().max())
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@DTYPES
@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula(name, stage, schedule, dtype):
    check(CASES[name], stage, machine_of(schedule=schedule), dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_of_threads_changes_no_bit(stage):
    inputs = CASES["four rows"].tensors(torch.float32)
    answers = [run(*inputs, stage, machine_of(schedule=schedule)) for schedule in emulate.SCHEDULES]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@DTYPES
@pytest.mark.parametrize("name", ["one row", "odd features", "rows between 16 bytes"])
def test_the_last_stage_reads_the_weight_once(name, dtype):
    """Each 4 outputs read x; of the last 4, what is past the last output is the last again. Stage 1: a weight a row."""
    case = CASES[name]
    x, weight, bias = case.tensors(dtype)
    read = {stage: machine_of() for stage in (1, 2)}
    for stage, machine in read.items():
        run(x, weight, bias, stage, machine)
        assert machine.counts.global_written == case.M * case.Dout * x.itemsize
    blocks = -(-case.Dout // 4)
    biases = case.M * case.Dout * x.itemsize if case.bias else 0
    row = case.Din * x.itemsize
    assert read[2].counts.global_read == blocks * (4 + case.M) * row + biases
    assert read[1].counts.global_read == case.M * case.Dout * 2 * row + biases


@pytest.mark.parametrize(
    "case, stage, R", [(Case(M=5), 1, 0), (Case(M=5), 0, 0), (Case(M=0), 2, 0), (Case(), 3, 0), (Case(), 0, 4)]
)
def test_what_a_stage_does_not_take_is_refused(case, stage, R):
    with pytest.raises(ValueError, match="does not take this shape"):
        run(*case.tensors(torch.float32), stage, machine_of(), R)


def test_python_names_the_fields_of_the_header():
    body = re.search(r"struct Linear {(.*?)\n};", (SOURCES / "linear.h").read_text(), re.DOTALL).group(1)
    declared = re.findall(r"[\w]+(?=[,;])", re.sub(r"//.*", "", body))
    assert declared == [field[0] for field in Linear._fields_]


class Mutant(NamedTuple):
    without: str
    killer: str
    case: Case
    stage: int


MUTANTS = {
    1301: Mutant("a warp after the last output does nothing", OUTSIDE, CASES["few"], 1),
    1302: Mutant("outputs after the last are not read", OUTSIDE, CASES["few"], 2),
    1303: Mutant("barrier: sums are not added up before every warp's are there", RACE, CASES["few"], 2),
    1304: Mutant("a thread after the last sum does nothing", OUTSIDE_SHARED, CASES["few"], 2),
    1305: Mutant("outputs after the last are not written", OUTSIDE, CASES["one number"], 2),
}


@pytest.mark.parametrize("number", MUTANTS)
def test_a_mutant_is_killed(number):
    _, killer, case, stage = MUTANTS[number]
    check_killed(number, killer, lambda machine: check(case, stage, machine), library())
