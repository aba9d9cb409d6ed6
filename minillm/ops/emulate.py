"""Run the CUDA kernels of attention on the emulated GPU: on this processor, slowly, and watched.

The same .cu files that nvcc compiles run here, each thread of a block in turn (csrc/emulator). A barrier that not all
threads reach, a race in shared memory, a read outside the tensors: each is an EmulationError that names the line.
"""

import ctypes
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.ops.attention import attention as ops_attention
from minillm.ops.build import build
from minillm.ops.build_plan import SOURCES

STAGES = {"v1": 1, "v2": 2, "v3": 3, "v4": 4, "v5": 5}  # of attention's forward pass
BACKWARD_STAGES = {"v1": 1, "v2": 2}
SOURCE_FILES = ("attention.cu", "attention_decode.cu", *(f"attention_{stage}.cu" for stage in STAGES))
SOURCE_FILES += tuple(f"attention_backward_{stage}.cu" for stage in BACKWARD_STAGES)
SCHEDULES = ("forward", "reverse", "shuffled")  # the order in which the threads of a block take their turns
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INVALID_VALUE = 1  # cudaErrorInvalidValue: the kernel does not take this shape


class EmulationError(RuntimeError):
    """A kernel did what it must not do on a GPU."""


class _Heads(ctypes.Structure):  # csrc/common.h
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)]


class _Attention(ctypes.Structure):  # csrc/attention.h
    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "o")),
        ("lse", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("keys_batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", *"BHGTSK", "causal", "window", "prefix")),
        ("scale", ctypes.c_float),
    ]


class _AttentionGrad(ctypes.Structure):  # csrc/attention.h
    _fields_ = [
        ("forward", _Attention),
        *((name, _Heads) for name in ("grad_o", "grad_q", "grad_k", "grad_v")),
        ("delta", ctypes.c_void_p),
    ]


class _AttentionDecode(ctypes.Structure):  # csrc/attention_decode.h
    _fields_ = [("forward", _Attention), ("room", ctypes.c_void_p), ("splits", ctypes.c_int32)]


class Counts(ctypes.Structure):
    """What the kernels of one call did: see csrc/emulator/report.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("global_read", "global_written", "shared_read", "shared_written"),
            *("shuffles", "mma", "barriers", "blocks", "conflicts"),
        )
    ]


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    """The emulated kernels of attention, compiled by g++ on first use, or those at `path`."""
    loaded = ctypes.CDLL(str(path or build("emulated", only=SOURCE_FILES)))
    loaded.emulator_region.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.emulator_error.restype = loaded.emulator_trace.restype = ctypes.c_char_p
    loaded.emulator_counts.restype = ctypes.POINTER(Counts)
    loaded.emulator_reached_mutant.restype = ctypes.c_bool
    return loaded


@dataclass
class Machine:
    """How the emulated GPU runs a call, and after it what was seen.

    schedule: the order in which the threads of a block take their turns; a right kernel does not care.
    mutant: the number of a line that is left out (csrc/cuda/MUTANTS.md).
    traced_block: its number in the grid; `trace` then tells what it did from barrier to barrier.
    path: a library of another build.
    """

    schedule: str = "forward"
    seed: int = 0
    mutant: int = 0
    traced_block: int = -1
    path: Path | None = None
    counts: Counts | None = None
    trace: str = ""
    reached_mutant: bool = False

    def call(self, name: str, arguments: ctypes.Structure, *rest, memory: Iterable[Tensor]) -> None:
        """Run the launcher `name`; its kernels may touch the storage of the tensors in `memory` and nothing else.

        ValueError: the kernel does not take this shape. EmulationError: it did what it must not do.
        """
        if self.schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        kernels = library(self.path)
        kernels.emulator_configure(SCHEDULES.index(self.schedule), self.seed, self.mutant, self.traced_block)
        for tensor in memory:
            storage = tensor.untyped_storage()
            kernels.emulator_region(storage.data_ptr(), storage.nbytes())
        status = kernels[name](ctypes.byref(arguments), *rest, None)
        self.counts = Counts.from_buffer_copy(kernels.emulator_counts().contents)
        self.trace = kernels.emulator_trace().decode()
        self.reached_mutant = kernels.emulator_reached_mutant()
        if status == INVALID_VALUE:
            raise ValueError(f"{name} does not take this shape or dtype")
        if status:
            raise EmulationError(kernels.emulator_error().decode() or f"{name} failed with cudaError {status}")


def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    stage: str = "v2",
    keys: Bool[Tensor, "#B S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    scale: float | None = None,
    machine: Machine | None = None,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T"]]:
    """(o, lse), as csrc/attention.h says. float32 or bfloat16 on the CPU, any strides but for the features."""
    o = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    arguments = _arguments(q, k, v, o, lse, keys, causal, window, prefix, scale)
    machine = machine or Machine()
    memory = [x for x in (q, k, v, o, lse, keys) if x is not None]
    machine.call("minillm_attention_forward", arguments, _number(STAGES, stage), memory=memory)
    return o, lse


def attention_backward(
    grad_o: Float[Tensor, "B H T K"],
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    o: Float[Tensor, "B H T K"],
    lse: Float[Tensor, "B H T"],
    *,
    stage: str = "v1",
    keys: Bool[Tensor, "#B S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    scale: float | None = None,
    machine: Machine | None = None,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
    """The gradients of q, k and v, from what `attention` returned and the gradient of its `o`."""
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    delta = torch.full(lse.shape, math.nan)
    forward = _arguments(q, k, v, o, lse, keys, causal, window, prefix, scale)
    arguments = _AttentionGrad(forward, *map(_heads, (grad_o, *grads)), delta.data_ptr())
    memory = [x for x in (grad_o, q, k, v, o, lse, delta, *grads, keys) if x is not None]
    (machine or Machine()).call("minillm_attention_backward", arguments, _number(BACKWARD_STAGES, stage), memory=memory)
    return tuple(grads)


def attention_decode(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    splits: int = 2,
    keys: Bool[Tensor, "#B S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    scale: float | None = None,
    machine: Machine | None = None,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T"]]:
    """`attention` for few queries: the keys of each head are divided over `splits` blocks."""
    o = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    room = torch.full((splits, *q.shape[:3], q.shape[3] + 2), math.nan)
    forward = _arguments(q, k, v, o, lse, keys, causal, window, prefix, scale)
    memory = [x for x in (q, k, v, o, lse, room, keys) if x is not None]
    (machine or Machine()).call(
        "minillm_attention_decode", _AttentionDecode(forward, room.data_ptr(), splits), 0, memory=memory
    )
    return o, lse


def _number(stages: dict[str, int], stage: str) -> int:
    if stage not in stages:
        raise ValueError(f"there is no stage {stage!r}: choose one of {', '.join(stages)}")
    return stages[stage]


def _heads(x: Tensor) -> _Heads:
    if x.stride(3) != 1 or x.device.type != "cpu":
        raise ValueError(
            f"the emulated GPU reads CPU tensors whose features lie side by side, not {x.stride()} {x.device}"
        )
    return _Heads(x.data_ptr(), *x.stride()[:3])


def _arguments(q, k, v, o, lse, keys, causal, window, prefix, scale) -> _Attention:
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v should all be float32 or all bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    B, H, T, K = q.shape
    if keys is not None and keys.stride(1) != 1:
        raise ValueError("keys should lie side by side")
    return _Attention(
        *map(_heads, (q, k, v, o)),
        lse.data_ptr(),
        None if keys is None else keys.data_ptr(),
        0 if keys is None or len(keys) == 1 else keys.stride(0),
        DTYPES[q.dtype],
        *(B, H, k.shape[1], T, k.shape[2], K),
        *(causal, window, prefix),
        1 / math.sqrt(K) if scale is None else scale,
    )


def trace(
    stage: str = "v2",
    *,
    queries: int = 64,
    keys: int = 64,
    features: int = 32,
    block: int = 0,
    mutant: int = 0,
    schedule: str = "forward",
) -> str:
    """What one block of causal attention does from barrier to barrier, what all blocks read, and whether it is right.

    The queries are the newest of the keys' positions. block, mutant, schedule: see `Machine`.
    """
    if not 0 < queries <= keys:
        raise ValueError(f"queries should be 1 to keys, the newest of these, not {queries} of {keys}")
    machine = Machine(schedule=schedule, mutant=mutant, traced_block=block)
    shape = (1, 1, keys, features)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
    q = q[:, :, keys - queries :]
    try:
        o, _ = attention(q, k, v, stage=stage, causal=True, machine=machine)
        wanted = ops_attention.implementations["reference"](q.double(), k.double(), v.double(), causal=True)
        result = f"largest difference from the formula in float64: {(o - wanted).abs().max().item():.1e}"
    except EmulationError as error:
        result = f"error: {error}"
    counts, row = machine.counts, 2 * features
    asked = f"attention {stage}: {queries} queries, {keys} keys, {features} features, bfloat16, causal"
    moved = f"{counts.global_read:,} bytes of global memory read, {counts.global_written:,} written"
    size = f"q, k and v have {(queries + 2 * keys) * row:,}, o and lse {queries * (row + 4):,}"
    return f"{asked}\n{_with_reasons(machine.trace)}all {counts.blocks} blocks: {moved}; {size}\n{result}"


def _with_reasons(trace: str) -> str:
    """The trace with what the kernel's source says beside each barrier."""

    def reason(match: re.Match) -> str:
        line = (SOURCES / "cuda" / match[2]).read_text().splitlines()[int(match[3]) - 1]
        _, _, comment = line.partition("//")
        return f"{match[0]}  {comment.strip()}".rstrip()

    return re.sub(r"(barrier (\S+):(\d+)).*", reason, trace)
