"""The CUDA kernels of low-rank adapters, run on the emulated GPU, against the formula in float64.

Low precision: at most twice the error of the torch implementation in the same types.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mutants import BETWEEN, NEEDLESS, OUTSIDE, RACE, WRONG, check_killed
from torch import Tensor

from minillm.ops import emulate, lora_gather
from minillm.ops.build import build
from minillm.ops.build_plan import SOURCES

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # of the error, relative: where torch's is 0 by luck
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
FILES = sorted((SOURCES / "cuda").glob("lora*.cu*")) + [
    SOURCES / "cuda" / name for name in ("global.cuh", "dropout.cuh")
]


@functools.cache
def library() -> Path:
    return build("emulated", only=tuple(file.name for file in FILES if file.suffix == ".cu"))


def machine_of(**settings) -> emulate.Machine:
    return emulate.Machine(path=library(), **settings)


def structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
Rows = structure("Rows", data=POINTER, batch=LONG, row=LONG)
Factors = structure("Factors", data=POINTER, adapter=LONG, rank=LONG)
LoraGather = structure(
    "LoraGather",
    **dict.fromkeys(("x", "y", "out"), Rows),
    **dict.fromkeys(("a", "b"), Factors),
    **dict.fromkeys(("u", "rows", "ranks", "scale"), POINTER),
    **dict.fromkeys(("dtype", "factor_dtype", "B", "T", "N", "R", "Din", "Dout"), INT),
)
LoraGatherGrad = structure(
    "LoraGatherGrad",
    forward=LoraGather,
    **dict.fromkeys(("grad", "grad_x"), Rows),
    **dict.fromkeys(("grad_a", "grad_b", "grad_scale", "v"), POINTER),
)
LoraLinear = structure(
    "LoraLinear",
    **dict.fromkeys(("x", "y", "out", "u", "a", "b"), POINTER),
    **dict.fromkeys(("x_row", "y_row", "out_row", "a_row", "b_row"), LONG),
    **dict.fromkeys(("dtype", "factor_dtype", "M", "Din", "Dout", "R"), INT),
    **dict.fromkeys(("scale", "dropout"), FLOAT),
    seed=ctypes.c_uint32 * 2,
)
LoraLinearGrad = structure(
    "LoraLinearGrad",
    forward=LoraLinear,
    **dict.fromkeys(("grad", "base", "grad_x"), POINTER),
    **dict.fromkeys(("grad_row", "base_row", "grad_x_row"), LONG),
    **dict.fromkeys(("grad_a", "grad_b", "v", "room"), POINTER),
    parts=INT,
)


@pytest.mark.parametrize("file, types", [("lora.h", (Rows, Factors, LoraGather, LoraGatherGrad)),
                                         ("lora_linear.h", (LoraLinear, LoraLinearGrad))])  # fmt: skip
def test_python_names_the_fields_of_the_headers(file, types):
    text = re.sub(r"//.*", "", (SOURCES / file).read_text())
    for structure in types:
        body = re.search(rf"struct {structure.__name__} {{(.*?)\n}};", text, re.DOTALL).group(1)
        declared = []
        for line in filter(str.strip, body.split(";")):
            names = re.match(r"\s*(?:const )?\w+\s*(.*)", line, re.DOTALL).group(1)
            declared += [re.sub(r"\[\d+\]", "", field).strip(" *\n") for field in names.split(",")]
        assert declared == [field[0] for field in structure._fields_]


def nans(*shape, dtype=torch.float32) -> Tensor:
    """What a kernel should overwrite."""
    return torch.full(shape, torch.nan, dtype=dtype)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows_of(x: Tensor | None) -> Rows:
    return Rows() if x is None else Rows(x.data_ptr(), *x.stride()[:2])


def factors_of(x: Tensor) -> Factors:
    return Factors(x.data_ptr(), *x.stride()[:2])


def check_error(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    if ours.numel() == 0:
        return
    error, their_error = ((x.double() - exact).abs().max() for x in (ours, theirs))
    allowed = 2 * their_error + FLOOR[ours.dtype] * (1 + exact.abs().max())
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@dataclass
class Mixed:
    """A batch of rows with adapters of different ranks."""

    rows: tuple[int, ...] | None = (2, -1, 0, 3, 1, 2)  # None: row i has adapter i
    ranks: tuple[int, ...] = (64, 1, 5, 33)
    T: int = 1
    Din: int = 40
    Dout: int = 264
    told: bool = True  # the kernels are told the ranks, and what lies past them is NaN; else zeros are added
    strided: bool = False
    without_y: bool = False

    turned = True  # B has its features side by side

    def numbers(self) -> list[int]:
        return list(range(len(self.ranks)) if self.rows is None else self.rows)

    def tensors(self, dtype, factor_dtype):
        """y, x, a (N, R, Din), b (N, R, Dout), scale, a gradient of the output."""
        random = torch.Generator().manual_seed(self.T + self.Din)

        def draw(width, type=dtype):
            B, wide = len(self.numbers()), width + 8 * self.strided
            x = torch.randn(self.T, B, wide, generator=random).transpose(0, 1)
            return (x if self.strided else x.contiguous()).to(type)[..., :width]

        a, b = (torch.zeros(len(self.ranks), max(self.ranks), width) for width in (self.Din, self.Dout))
        for n, rank in enumerate(self.ranks):
            a[n, :rank] = torch.randn(rank, self.Din, generator=random) / self.Din**0.5
            b[n, :rank] = torch.randn(rank, self.Dout, generator=random)
        y, x, grad = draw(self.Dout), draw(self.Din), draw(self.Dout)
        scale = torch.tensor([0.5, -1.5, 1.0, 0.25][: len(self.ranks)])
        return torch.zeros_like(y) if self.without_y else y, x, a.to(factor_dtype), b.to(factor_dtype), scale, grad

    def arguments(self, y, x, a, b, scale):
        """The call, its outputs, and all memory that kernels may touch."""
        told = torch.tensor(self.ranks)
        if self.told:
            a, b = a.clone(), b.clone()
            for n, rank in enumerate(self.ranks):
                a[n, rank:], b[n, rank:] = torch.nan, torch.nan
        B, (N, R, Din), Dout = len(self.numbers()), a.shape, b.shape[2]
        out, u = nans(*y.shape, dtype=y.dtype), nans(B, self.T, R)
        numbers = None if self.rows is None else torch.tensor(self.rows, dtype=torch.long)
        call = LoraGather(
            *(rows_of(x), rows_of(None if self.without_y else y), rows_of(out)),
            *(factors_of(a), factors_of(b)),
            *(pointer(u), pointer(numbers), pointer(told if self.told else None), pointer(scale)),
            *(emulate.DTYPES[x.dtype], emulate.DTYPES[a.dtype], B, self.T, N, R, Din, Dout),
        )
        return call, out, u, [t for t in (y, x, a, b, scale, out, u, numbers, told) if t is not None]

    def by(self, implementation, y, x, a, b, scale):
        rows = torch.tensor(self.numbers(), dtype=torch.long)
        return lora_gather.implementations[implementation](y, x, a, b.mT, rows, scale.to(a.dtype))


MIXED = {
    "decoding": Mixed(),
    "odd sizes": Mixed(Din=37, Dout=29),
    "long rows": Mixed(rows=(1, 0), ranks=(3, 6), Din=2060, Dout=272),
    "a few positions": Mixed(rows=(1, -1, 0), ranks=(4, 8), T=3, Din=64, Dout=64, told=False),
    "texts": Mixed(rows=(1, -1, 0), ranks=(5, 33), T=35, Din=70, Dout=140),
    "texts in whole registers": Mixed(rows=(1, -1, 0), ranks=(5, 33), T=35, Din=72, Dout=136),
    "an adapter each": Mixed(rows=None, ranks=(2, 7, 1), T=2, Din=24, Dout=32),
    "strided": Mixed(rows=(0, 1), ranks=(8, 9), T=33, Din=32, Dout=40, strided=True),
    "update alone": Mixed(rows=(0, -1), ranks=(3,), Din=16, Dout=9, without_y=True),
    "one number": Mixed(rows=(0,), ranks=(1,), Din=1, Dout=1),
    "adapters unused": Mixed(rows=(-1, -1), Din=8, Dout=8),
    "no position": Mixed(T=0),
    "no row": Mixed(rows=()),
}
STAGES = (1, 2, 3, 4, 0)


def run_gather(case: Mixed, types, stage: int, machine: emulate.Machine) -> None:
    """Forward, and the check of its results."""
    y, x, a, b, scale, _ = case.tensors(*types)
    call, out, u, memory = case.arguments(y, x, a, b, scale)
    machine.call("minillm_lora_gather", call, stage, memory=memory)
    exact = case.by("reference", *(t.double() for t in (y, x, a, b, scale)))
    check_error(out, case.by("torch", y, x, a, b, scale), exact)
    for row, n in enumerate(case.numbers()):
        wanted = x[row].double() @ a[n].double().mT if n >= 0 else torch.zeros_like(u[row], dtype=torch.float64)
        torch.testing.assert_close(u[row].double(), wanted, rtol=1e-4, atol=1e-4)


def takes(stage: int, case, types) -> bool:
    """Stage 4 wants bfloat16, and rows that are whole registers."""
    return stage != 4 or (types[1] == torch.bfloat16 and case.Din % 8 == case.Dout % 8 == 0 and case.turned)


def runs(cases, stages) -> list:
    params = []
    for number, (name, case) in enumerate(cases.items()):
        for stage in stages:
            for types in TYPES:
                if takes(stage, case, types):
                    order = emulate.SCHEDULES[(number + stage) % 3]
                    label = "-".join([name, f"v{stage}", *(str(t)[6:] for t in types)])
                    params.append(pytest.param(case, types, stage, order, id=label))
    return params


@pytest.mark.parametrize("case, types, stage, schedule", runs(MIXED, STAGES))
def test_mixed_batches_are_the_formula(case, types, stage, schedule):
    run_gather(case, types, stage, machine_of(schedule=schedule, seed=case.Din))


def run_gather_backward(case: Mixed, types, stage: int, machine: emulate.Machine) -> list[Tensor]:
    y, x, a, b, scale, grad = case.tensors(*types)
    call, _, u, memory = case.arguments(y, x, a, b, scale)
    machine_of().call("minillm_lora_gather", call, 3, memory=memory)
    grads = [torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (x, a, b, scale)]
    grad_x, grad_a, grad_b, grad_scale = grads
    v = nans(*u.shape)
    arguments = LoraGatherGrad(call, rows_of(grad), rows_of(grad_x), *map(pointer, (grad_a, grad_b, grad_scale, v)))
    machine.call("minillm_lora_gather_backward", arguments, stage, memory=[*memory, grad, *grads, v])

    def by_autograd(implementation, *inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = case.by(implementation, *inputs)
        return torch.autograd.grad(out, inputs[1:], grad.to(out.dtype))

    exact = by_autograd("reference", *(t.double() for t in (y, x, a, b, scale)))
    theirs = by_autograd("torch", y, x, a, b, scale)
    for ours, their, wanted in zip(grads, theirs, exact, strict=True):
        check_error(ours, their, wanted)
    return grads


@pytest.mark.parametrize("case, types, stage, schedule", runs(MIXED, (1, 4, 0)))
def test_gradients_of_mixed_batches(case, types, stage, schedule):
    run_gather_backward(case, types, stage, machine_of(schedule=schedule))


def test_gradients_have_the_same_bits_in_any_order_of_threads():
    case, types = replace(MIXED["texts"], rows=(1, 0, 1)), TYPES[0]
    first, *others = (run_gather_backward(case, types, 3, machine_of(schedule=s)) for s in emulate.SCHEDULES)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@dataclass
class Single:
    """One adapter beside a layer."""

    M: int = 35
    Din: int = 40
    Dout: int = 72
    R: int = 8
    dropout: float = 0.0
    strided: bool = False
    parts: int = 1
    scale: float = 0.75
    seed: tuple[int, int] = (1234, 5678)
    in_place: bool = False  # the results are written where y and the gradient of x by the base are read
    without_base: bool = False  # there is no such gradient

    def tensors(self, dtype, factor_dtype):
        """x, y, a, b, a gradient of the output, and that of x by the base."""
        random = torch.Generator().manual_seed(self.M)

        def draw(rows, width, type):
            return torch.randn(rows, width + 8 * self.strided, generator=random).to(type)[:, :width]

        x, y, grad, base = (draw(self.M, w, dtype) for w in (self.Din, self.Dout, self.Dout, self.Din))
        return x, y, draw(self.R, self.Din, factor_dtype), draw(self.Dout, self.R, factor_dtype), grad, base

    def written(self, read: Tensor) -> Tensor:
        """Where a result goes: over what is read, or beside it, in rows of another length."""
        if self.in_place:
            return read.as_strided(read.shape, read.stride()).clone(memory_format=torch.preserve_format)
        return nans(read.shape[0], read.shape[1] + 16 * self.strided, dtype=read.dtype)[:, : read.shape[1]]

    @property
    def turned(self) -> bool:
        return self.R % 4 == 0

    def kept(self) -> Tensor:
        """(M, Din), float64: what dropout multiplies x by, in Python's own numbers."""
        if not self.dropout:
            return torch.ones(self.M, self.Din, dtype=torch.float64)
        limit = round(self.dropout * 2**24)
        low, high = self.seed
        factors = []
        for row in range(self.M):
            key = mix(mix((low + row) % 2**32) ^ (mix(high) + 0x9E3779B9) % 2**32)
            factors.append([mix((key + k * 0x9E3779B9) % 2**32) >> 8 >= limit for k in range(self.Din)])
        return torch.tensor(factors).double() / (1 - limit / 2**24)


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


SINGLE = {
    "some rows": Single(),
    "dropout": Single(dropout=0.3),
    "odd sizes": Single(M=37, Din=37, Dout=29, R=5, dropout=0.1),
    "rank 64": Single(M=5, Din=33, Dout=130, R=64),
    "strided": Single(M=34, strided=True, dropout=0.5),
    "in place": Single(M=34, strided=True, dropout=0.5, in_place=True),
    "no gradient of the base": Single(M=9, dropout=0.5, without_base=True),
    "whole registers": Single(M=35, Din=136, Dout=72, R=20, dropout=0.25),
    "parts": Single(M=70, Din=24, Dout=16, R=3, dropout=0.2, parts=3),
    "more parts than rows": Single(M=2, Din=8, Dout=8, R=2, parts=4),
    "one number": Single(M=1, Din=1, Dout=1, R=1),
    "no row": Single(M=0),
}


def run_linear(case: Single, types, stage: int, machine: emulate.Machine, backward: emulate.Machine | None = None):
    """Forward on `machine`, and the gradients on `backward`; both checked."""
    x, y, a, b, grad, base = case.tensors(*types)
    u, v = nans(case.M, case.R), nans(case.M, case.R)
    out, grad_x = case.written(y), case.written(base)
    read_y, read_base = (out, grad_x) if case.in_place else (y, base)
    call = LoraLinear(
        *map(pointer, (x, read_y, out, u, a, b)),
        *(t.stride(0) for t in (x, read_y, out, a, b)),
        *(emulate.DTYPES[x.dtype], emulate.DTYPES[a.dtype], case.M, case.Din, case.Dout, case.R),
        *(case.scale, round(case.dropout * 2**24) / 2**24, (ctypes.c_uint32 * 2)(*case.seed)),
    )
    memory = [x, read_y, out, u, a, b]
    machine.call("minillm_lora_linear", call, stage, memory=memory)

    def formula(x, y, a, b, kept):
        return (y + case.scale * ((x * kept).to(a.dtype) @ a.mT) @ b.mT).to(y.dtype)

    kept = case.kept()
    check_error(out, formula(x, y, a, b, kept.to(x.dtype)), formula(*(t.double() for t in (x, y, a, b)), kept))
    if not backward:
        return

    grad_a, grad_b = nans(*a.shape, dtype=a.dtype), nans(*b.shape, dtype=b.dtype)
    room = nans(case.parts, case.R, max(case.Din, case.Dout))
    arguments = LoraLinearGrad(
        *(call, pointer(grad), None if case.without_base else pointer(read_base), pointer(grad_x)),
        *(t.stride(0) for t in (grad, read_base, grad_x)),
        *map(pointer, (grad_a, grad_b, v, room)),
        case.parts,
    )
    memory += [grad, read_base, grad_x, grad_a, grad_b, v, room]
    backward.call("minillm_lora_linear_backward", arguments, stage, memory=memory)

    def by_autograd(*inputs):
        x, y, a, b, kept = inputs = [t.detach().requires_grad_() for t in inputs]
        out = formula(x, y, a, b, kept.detach())
        of_x, of_a, of_b = torch.autograd.grad(out, (x, a, b), grad.to(out.dtype))
        return of_x if case.without_base else base.to(of_x.dtype) + of_x, of_a, of_b

    exact = by_autograd(*(t.double() for t in (x, y, a, b)), kept)
    theirs = by_autograd(x, y, a, b, kept.to(x.dtype))
    for ours, their, wanted in zip((grad_x, grad_a, grad_b), theirs, exact, strict=True):
        check_error(ours, their, wanted)


@pytest.mark.parametrize("case, types, stage, schedule", runs(SINGLE, (1, 3, 4, 0)))
def test_one_adapter_is_the_formula(case, types, stage, schedule):
    run_linear(case, types, stage, *(machine_of(schedule=schedule) for _ in range(2)))


def test_dropout_keeps_as_many_as_it_should_and_none_twice():
    """Of 400 x 400 numbers 3/4 within 5 standard deviations, in all and in each row and column; seeds differ."""
    case = Single(M=400, Din=400, dropout=0.25)
    kept = case.kept() > 0
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / 400**2) ** 0.5
    for dim in (0, 1):
        assert (kept.double().mean(dim) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    for seed in ((1235, 5678), (1234, 5679)):
        same = (kept == (replace(case, seed=seed).kept() > 0)).double().mean()
        assert abs(same - (0.75**2 + 0.25**2)) < 0.01


def test_what_no_kernel_takes_is_refused():
    machine = machine_of()
    with pytest.raises(ValueError, match="does not take this shape"):
        run_gather(MIXED["one number"], TYPES[0], 5, machine)
    with pytest.raises(ValueError, match="does not take this shape"):
        run_gather(MIXED["one number"], TYPES[0], -1, machine)
    with pytest.raises(ValueError, match="does not take this shape"):  # float32 rows with bfloat16 factors
        run_gather(MIXED["one number"], (torch.float32, torch.bfloat16), 1, machine)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match="does not take this shape"):
            run_linear(Single(dropout=dropout), TYPES[0], 1, machine)
    with pytest.raises(ValueError, match="does not take this shape"):  # B with its ranks side by side
        run_linear(Single(), TYPES[0], 2, machine)


def check_cancelling(stage: int, machine: emulate.Machine) -> None:
    """Two ranks whose u are about 100, and their difference, which B takes, about 1: u is not rounded to bfloat16."""
    case = Mixed(rows=(0,), ranks=(2,), T=4, Din=16, Dout=8, without_y=True)
    y, x, a, b, scale, _ = case.tensors(torch.bfloat16, torch.bfloat16)
    a[0] = 100 * a[0, 0]
    a[0, 1, 0] += 2
    b[0] = torch.tensor([1, -1])[:, None]
    call, out, _, memory = case.arguments(y, x, a, b, scale)
    machine.call("minillm_lora_gather", call, stage, memory=memory)
    torch.testing.assert_close(
        out.double(), case.by("reference", *(t.double() for t in (y, x, a, b, scale))), rtol=0.01, atol=1e-3
    )


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_what_is_between_the_products_is_not_rounded(stage):
    check_cancelling(stage, machine_of())


class Mutant(NamedTuple):
    without: str
    killer: str
    run: Callable[[emulate.Machine], object]


def gather(name, stage, types=TYPES[0]):
    return lambda machine: run_gather(MIXED[name], TYPES[1] if stage == 4 else types, stage, machine)


def gather_backward(name, stage):
    return lambda machine: run_gather_backward(MIXED[name], TYPES[1] if stage == 4 else TYPES[0], stage, machine)


def single(name, stage):
    return lambda machine: run_linear(SINGLE[name], TYPES[1] if stage == 4 else TYPES[0], stage, machine)


def single_backward(name, stage):
    return lambda machine: run_linear(SINGLE[name], TYPES[stage == 4], stage, machine_of(), machine)


WHOLE = "texts in whole registers"
MUTANTS = {
    # global.cuh
    1101: Mutant("eight numbers are read at once only where there are eight", OUTSIDE, gather("long rows", 2)),
    1102: Mutant("16 bytes are read at once only where they begin on 16", BETWEEN, gather("odd sizes", 3)),
    1103: Mutant("numbers after the last are not read", OUTSIDE, gather("odd sizes", 2)),
    # lora_gather.cuh
    1111: Mutant("a row without adapter has none", OUTSIDE, gather("decoding", 1)),
    # lora_gather_v1.cu
    1121: Mutant("a thread after the last of u does nothing", OUTSIDE, gather("one number", 1)),
    1122: Mutant("ranks after an adapter's last are not read", WRONG, gather("decoding", 1)),
    1123: Mutant("a thread after the last output does nothing", OUTSIDE, gather("one number", 1)),
    # lora_gather_v2.cu
    1131: Mutant("ranks after the last are not read", OUTSIDE, gather("long rows", 2)),
    1132: Mutant("shrink: rows are read 16 bytes at a time only where they are whole", BETWEEN, gather("odd sizes", 2)),
    1133: Mutant("barrier: parts are not added before all are there", RACE, gather("decoding", 2)),
    1134: Mutant("ranks after the last are not written", OUTSIDE, gather("one number", 2)),
    1135: Mutant("u is 0 after an adapter's last rank", WRONG, gather("decoding", 2)),
    1136: Mutant("features after the last are not read", OUTSIDE, gather("a few positions", 2)),
    1137: Mutant("expand: rows are read 16 bytes at a time only where they are whole", BETWEEN, gather("odd sizes", 2)),
    1138: Mutant("barrier: parts are not added before all are there", RACE, gather("decoding", 2)),
    1139: Mutant("features after the last are not written", OUTSIDE, gather("one number", 2)),
    # lora_gather_v3.cu
    1141: Mutant("barrier: a tile is not replaced before all have used it", RACE, gather("texts", 3)),
    1142: Mutant("barrier: a tile is not used before all of it is there", RACE, gather("texts", 3)),
    1143: Mutant("positions after the last are not written", OUTSIDE, gather("one number", 3)),
    1144: Mutant("ranks after the last are not written", OUTSIDE, gather("one number", 3)),
    1145: Mutant("barrier: a tile is not replaced before all have used it", RACE, gather("texts", 3)),
    1146: Mutant("barrier: a tile is not used before all of it is there", RACE, gather("texts", 3)),
    1147: Mutant("features after the last are not read", OUTSIDE, gather("one number", 3)),
    1148: Mutant("positions after the last are not written", OUTSIDE, gather("one number", 3)),
    1149: Mutant("features after the last are not written", OUTSIDE, gather("one number", 3)),
    # lora_gather_tiles.cuh
    1151: Mutant("positions after the last are not read", OUTSIDE, gather("one number", 3)),
    1152: Mutant("ranks after an adapter's last are not read", OUTSIDE, gather("texts", 3)),
    1153: Mutant("u after the last position is not read", OUTSIDE, gather("one number", 3)),
    1154: Mutant(
        "features after the last, of a matrix (Dout, R), are not read", OUTSIDE, single_backward("odd sizes", 3)
    ),
    # lora_gather_sum.cuh and lora_gather_sum_v1.cu
    1161: Mutant("barrier: a tile is not replaced before all have used it", RACE, gather_backward("texts", 3)),
    1162: Mutant("barrier: a tile is not used before all of it is there", RACE, gather_backward("texts", 3)),
    1163: Mutant("a part ends where the next begins", WRONG, single_backward("parts", 3)),
    1164: Mutant("ranks after the last are not written", OUTSIDE, gather_backward("one number", 3)),
    1165: Mutant("features after the last are not written", OUTSIDE, gather_backward("one number", 3)),
    1166: Mutant("a thread after the last sum does nothing", OUTSIDE, single_backward("parts", 3)),
    # lora_gather_v4.cu
    1171: Mutant("features after the last are not read", OUTSIDE, gather(WHOLE, 4)),
    1172: Mutant("positions after the last are not read", OUTSIDE, gather(WHOLE, 4)),
    1173: Mutant("ranks after an adapter's last are not read", OUTSIDE, gather(WHOLE, 4)),
    1174: Mutant("barrier: sums are not added before all are there", RACE, gather(WHOLE, 4)),
    1175: Mutant("positions after the last are not written", OUTSIDE, single("whole registers", 4)),
    1176: Mutant("ranks after the last are not written", RACE, single("whole registers", 4)),
    1177: Mutant("features of B after the last are not read", OUTSIDE, gather(WHOLE, 4)),
    1178: Mutant("ranks of B after an adapter's last are not read", OUTSIDE, gather(WHOLE, 4)),
    1179: Mutant("ranks of a matrix (Dout, R) after the last are not read", OUTSIDE, single("whole registers", 4)),
    1182: Mutant("a warp after the last feature reads nothing", NEEDLESS, gather(WHOLE, 4)),
    1183: Mutant("u after the last position is not read", OUTSIDE, gather(WHOLE, 4)),
    1184: Mutant("u after the last rank is not read", OUTSIDE, single("whole registers", 4)),
    1185: Mutant("positions after the last are not written", OUTSIDE, single("whole registers", 4)),
    1186: Mutant("features after the last are not written", RACE, single("whole registers", 4)),
    # lora_gather_mma.cuh
    1181: Mutant("u is multiplied as the sum of two bfloat16", WRONG, lambda machine: check_cancelling(4, machine)),
    # lora_gather_sum_v2.cu
    1191: Mutant("positions after the last are not read", OUTSIDE, gather_backward(WHOLE, 4)),
    1192: Mutant("features after the last are not read", OUTSIDE, gather_backward(WHOLE, 4)),
    1193: Mutant("ranks after the last are not read", OUTSIDE, gather_backward(WHOLE, 4)),
    1194: Mutant("barrier: sums are not added before all are there", RACE, gather_backward(WHOLE, 4)),
    1195: Mutant("ranks after the last are not written", OUTSIDE, single_backward("whole registers", 4)),
    1196: Mutant("features after the last are not written", RACE, single_backward("whole registers", 4)),
}


@pytest.mark.parametrize("number", MUTANTS)
def test_a_mutant_is_killed(number):
    _, killer, run = MUTANTS[number]
    check_killed(number, killer, run, library())
