"""Rotary embedding by our kernel: one pass over the memory instead of four."""

import torch
from torch import Tensor

from minillm.ops.native import below_autograd, wants_grad, why_not
from minillm.ops.rope import rope


def _cannot(x: Tensor, cos: Tensor, sin: Tensor) -> str:
    if cos.dtype != torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        return "a table that is not of float32, or does not lie side by side in memory"
    if cos.dim() == 3 and cos.shape[0] not in (1, x.shape[0]):
        return f"{cos.shape[0]} tables for {x.shape[0]} rows"
    return why_not(x)


@rope.native(_cannot)
def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    operation = torch.ops.minillm.rope.default
    if torch.compiler.is_compiling() or wants_grad(x):
        return operation(x, cos, sin)
    return below_autograd(operation, x, cos, sin)


def register() -> None:
    """Tell torch the operation's shapes and gradient: of a turn it is the turn back."""

    @torch.library.register_fake("minillm::rope")
    def _(x, cos, sin):
        return heads_like(x)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return torch.ops.minillm.rope(_adjacent(grad), cos, -sin), None, None

    torch.library.register_autograd("minillm::rope", backward, setup_context=keep)


def heads_like(x: Tensor) -> Tensor:
    """An empty (B, heads, rows, K) that lies in memory as (B, rows, heads, K), as our kernels give them."""
    B, H, T, K = x.shape
    return x.new_empty(B, T, H, K).transpose(1, 2)


def _adjacent(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()
