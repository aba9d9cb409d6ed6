"""The CUDA kernel of rotary embedding on the emulated GPU, against the definition in float64."""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mutants import RACE, check_killed
from torch import Tensor

from minillm import ops
from minillm.ops import emulate
from minillm.ops.build import build, obstacle
from minillm.ops.structures import structures

pytestmark = pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 16), (3, 2, 7, 34), (1, 9, 4, 64), (2, 1, 3, 256)]
Rope = structures("rope.h")["Rope"]


@functools.cache
def library() -> Path:
    return build("emulated", only=("rope.cu",))


def run(x: Tensor, cos: Tensor, sin: Tensor, machine: emulate.Machine, stage: int = 0) -> Tensor:
    y = torch.full_like(x, torch.nan)
    heads = [emulate.Heads(t.data_ptr(), *t.stride()[:3]) for t in (x, y)]
    tables = cos.data_ptr(), sin.data_ptr(), cos.stride(0) if cos.dim() == 3 else 0
    call = Rope(*heads, *tables, emulate.DTYPES[x.dtype], *x.shape)
    machine.call("minillm_rope", call, stage, memory=(x, y, cos, sin))
    return y


def inputs(shape, dtype, per_row):
    B, H, T, K = shape
    x = torch.randn(B, T, H, K).to(dtype).transpose(1, 2)
    return x, *ops.rotary_table(torch.randint(0, 50, (B, T)) if per_row else torch.arange(T) + 3, K)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape, per_row, dtype, schedule):
    x, cos, sin = inputs(shape, dtype, per_row)
    y = run(x, cos, sin, emulate.Machine(path=library(), schedule=schedule))
    with ops.use_backend("reference"):
        expected = ops.rope(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(y.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_every_number_is_read_once_and_written_once():
    """The tables are read for every head, from the cache of a real GPU."""
    x, cos, sin = inputs((2, 3, 5, 16), torch.float32, False)
    machine = emulate.Machine(path=library())
    run(x, cos, sin, machine)
    assert machine.counts.global_written == x.nbytes
    assert machine.counts.global_read == x.nbytes + 2 * 2 * 3 * cos.nbytes


class Mutant(NamedTuple):
    without: str
    killer: str


MUTANTS = {701: Mutant("a thread after the last pair does nothing", RACE)}


@pytest.mark.parametrize("number", MUTANTS)
def test_a_mutant_is_killed(number):
    x, cos, sin = inputs((2, 3, 5, 34), torch.float32, False)
    check_killed(number, MUTANTS[number].killer, lambda machine: run(x, cos, sin, machine), library())


def test_odd_features_are_refused():
    x, cos, sin = inputs((1, 1, 2, 4), torch.float32, False)
    with pytest.raises(ValueError, match="does not take this shape"):
        run(x[..., :3], cos, sin, emulate.Machine(path=library()))
