"""Attention by our kernels: no T x S table, padding told by one bit per key, and gradients without kept weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.ops.attention import attention
from minillm.ops.native import below_autograd, wants_grad, why_not
from minillm.ops.native_rope import heads_like

STAGES = range(1, 6)
_stage = 0


@contextlib.contextmanager
def use_attention_stage(stage: int) -> Iterator[None]:
    """Inside the `with` block, attention on a GPU runs the stage 1, 2, .. of our kernels; 0 is the best for each call.

    The stages are csrc/cuda/attention_v1.cu and so on, for reading in that order. A call that a stage does not take
    (3 and later: bfloat16 only) is an error. Stage 5 is for Hopper (H100, H200) and never chosen by 0: it compiles and
    runs emulated, but no GPU has run it yet.
    """
    global _stage
    if stage and stage not in STAGES:
        raise ValueError(f"stage={stage}: attention has the stages 1 to {STAGES[-1]}, and 0 for the best of them")
    before, _stage = _stage, stage
    try:
        yield
    finally:
        _stage = before


def _cannot(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> str:
    if bias is not None:
        return "a bias on the scores"
    if dropout:
        return "dropout of attention weights"
    if mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1):
        return "a mask of its own for each query or head"
    if k.shape[-1] != v.shape[-1]:
        return f"keys of {k.shape[-1]} features and values of {v.shape[-1]}"
    if _stage and not q.is_cuda:
        return f"stage {_stage} is one of the GPU's kernels; `minillm kernels emulate` runs it without a GPU"
    if q.is_cuda and q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} features, where the GPU's kernels take up to 256"
    return why_not(q, k, v) or (_stage == 5 and _not_for_hopper(q, k, v)) or ""


def _not_for_hopper(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What keeps stage 5 from a call that other stages take: see encode() in csrc/cuda/boxes.cuh."""
    if q.dtype != torch.bfloat16:
        return f"stage 5 multiplies bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 16:
        return f"stage 5 takes heads of a multiple of 16 features, not {q.shape[-1]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = [x.storage_offset(), *x.stride()[:3]]
        if any(step % 8 for step in steps) or any(s == 0 < n - 1 for s, n in zip(x.stride(), x.shape, strict=True)):
            return f"stage 5 copies from {name} in steps of 16 bytes, and its strides are {x.stride()}: .contiguous()"
    if (capability := torch.cuda.get_device_capability(q.device)) != (9, 0):
        return f"stage 5 is for GPUs of compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}"
    return ""


def _slower(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **_) -> str:
    """Small calls, where PyTorch's way around a kernel of ours costs more than the kernel saves."""
    queries, keys = q.shape[2], k.shape[2]
    if not wants_grad(q, k, v):
        least = 64 * 64 if queries > 1 else 128
    elif causal:
        least = 128 * 128
    else:
        least = 256 * 256
    return f"fewer than {least} pairs of a query and a key, where torch is faster" if queries * keys < least else ""


@attention.native(_cannot, _slower)
def _attention(q, k, v, *, mask=None, causal=False, window=0, prefix=0, bias=None, scale=None, dropout=0.0):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = None if mask is None else mask[:, 0, 0].contiguous()
    operation, arguments = torch.ops.minillm.attention.default, (q, k, v, keys, causal, window, prefix, scale, _stage)
    if torch.compiler.is_compiling() or wants_grad(q, k, v):
        return operation(*arguments)[0]
    return below_autograd(operation, *arguments)[0]


def register() -> None:
    """Tell torch the operations' shapes and the gradient."""

    @torch.library.register_fake("minillm::attention")
    def _(q, k, v, keys, causal, window, prefix, scale, stage=0):
        return heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("minillm::attention_backward")
    def _(grad_o, q, k, v, o, lse, keys, causal, window, prefix, scale):
        return heads_like(q), heads_like(k), heads_like(v)

    def keep(ctx, inputs, output):
        q, k, v, keys, *rest, _ = inputs
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, keys, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_o, _):
        if grad_o is None:
            return (None,) * 9
        q, k, v, keys, o, lse = ctx.saved_tensors
        grad_o = grad_o if grad_o.stride(-1) == 1 else grad_o.contiguous()
        grads = torch.ops.minillm.attention_backward(grad_o, q, k, v, o, lse, keys, *ctx.rest)
        return *grads, None, None, None, None, None, None

    torch.library.register_autograd("minillm::attention", backward, setup_context=keep)
