"""Attention on the emulated GPU, and a trace of what its kernels do there."""

import ctypes
import math
import re

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.ops.attention import attention as ops_attention
from minillm.ops.build_plan import SOURCES
from minillm.ops.emulator import DTYPES, SCHEDULES, Counts, EmulationError, Machine, library, sources
from minillm.ops.structures import structures

__all__ = ["DTYPES", "SCHEDULES", "Counts", "EmulationError", "Machine", "library", "sources"]
__all__ += ["BACKWARD_STAGES", "STAGES", "attention", "attention_backward", "attention_decode", "trace"]


def _stages(kernel: str) -> dict[str, int]:
    found = (re.fullmatch(rf"{kernel}_(v(\d+))\.cu", name) for name in sources(kernel))
    return {match[1]: int(match[2]) for match in found if match}


STAGES, BACKWARD_STAGES = _stages("attention"), _stages("attention_backward")
Heads, _Attention, _AttentionGrad = map(structures("attention.h").get, ("Heads", "Attention", "AttentionGrad"))
_AttentionDecode = structures("attention_decode.h")["AttentionDecode"]


def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    stage: str = "v2",
    machine: Machine | None = None,
    **rules,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T"]]:
    """(o, lse), as csrc/attention.h says. float32 or bfloat16 on the CPU, any strides but for the features.

    rules: keys (B, S), bool; causal, window, prefix, scale.
    """
    o = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    arguments, memory = _arguments(q, k, v, o, lse, **rules)
    (machine or Machine()).call("minillm_attention_forward", arguments, _number(STAGES, stage), memory=memory)
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
    machine: Machine | None = None,
    **rules,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
    """The gradients of q, k and v, from what `attention` returned and the gradient of its `o`."""
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    delta = torch.full(lse.shape, math.nan)
    forward, memory = _arguments(q, k, v, o, lse, **rules)
    arguments = _AttentionGrad(forward, *map(_heads, (grad_o, *grads)), delta.data_ptr())
    memory += [grad_o, delta, *grads]
    (machine or Machine()).call("minillm_attention_backward", arguments, _number(BACKWARD_STAGES, stage), memory=memory)
    return tuple(grads)


def attention_decode(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    *,
    splits: int = 2,
    machine: Machine | None = None,
    **rules,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T"]]:
    """`attention` for few queries: the keys of each head are divided over `splits` blocks."""
    o = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    room = torch.full((splits, *q.shape[:3], q.shape[3] + 2), math.nan)
    forward, memory = _arguments(q, k, v, o, lse, **rules)
    arguments = _AttentionDecode(forward, room.data_ptr(), splits)
    (machine or Machine()).call("minillm_attention_decode", arguments, 0, memory=[*memory, room])
    return o, lse


def _number(stages: dict[str, int], stage: str) -> int:
    if stage not in stages:
        raise ValueError(f"there is no stage {stage!r}: choose one of {', '.join(stages)}")
    return stages[stage]


def _heads(x: Tensor) -> ctypes.Structure:
    if x.stride(3) != 1 or x.device.type != "cpu":
        raise ValueError(
            f"the emulated GPU reads CPU tensors whose features lie side by side, not {x.stride()} {x.device}"
        )
    return Heads(x.data_ptr(), *x.stride()[:3])


def _arguments(
    *tensors: Tensor,
    keys: Bool[Tensor, "#B S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    scale: float | None = None,
) -> tuple[ctypes.Structure, list[Tensor]]:
    """The call of attention on q, k, v, o and lse, and the memory that it may touch."""
    q, k, v, o, lse = tensors
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v should all be float32 or all bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    B, H, T, K = q.shape
    if keys is not None and keys.stride(1) != 1:
        raise ValueError("keys should lie side by side")
    call = _Attention(
        *map(_heads, (q, k, v, o)),
        lse.data_ptr(),
        None if keys is None else keys.data_ptr(),
        0 if keys is None or len(keys) == 1 else keys.stride(0),
        DTYPES[q.dtype],
        *(B, H, k.shape[1], T, k.shape[2], K),
        *(causal, window, prefix),
        1 / math.sqrt(K) if scale is None else scale,
    )
    return call, [*tensors, *([] if keys is None else [keys])]


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
