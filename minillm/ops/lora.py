"""Low-rank adaptation of a linear layer: a frozen weight W plus a trainable product of two thin matrices.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1: h = W x + (alpha / r) B A x, with A (R, Din) and B (Dout, R).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from minillm.ops.dropout import Seed
from minillm.ops.dropout import dropout as dropout_op
from minillm.ops.registry import Op


@Op
def lora(
    y: Float[Tensor, "*batch Dout"],
    x: Float[Tensor, "*batch Din"],
    a: Float[Tensor, "R Din"],
    b: Float[Tensor, "Dout R"],
    scale: float,
    dropout: float = 0.0,
    seed: Seed | None = None,
) -> Float[Tensor, "*batch Dout"]:
    """Add a low-rank update of `x` to `y`, the output of any base layer.

    Semantics: y + scale * (drop(x) @ a.T) @ b.T, where drop is `ops.dropout` with this probability and seed. The update
    is computed in the dtype of `a` and the sum rounded once to the dtype of `y`, so float32 adapters serve a bfloat16
    base. Raises ValueError for a dropout outside [0, 1), or above 0 without a seed.
    """
    update = (dropout_op(x, dropout, seed).to(a.dtype) @ a.mT) @ b.mT
    return (y + scale * update).to(y.dtype)


@Op
def lora_linear(
    x: Float[Tensor, "*batch Din"],
    weight: Float[Tensor, "Dout Din"],
    bias: Float[Tensor, "Dout"] | None,
    a: Float[Tensor, "R Din"],
    b: Float[Tensor, "Dout R"],
    scale: float,
    dropout: float = 0.0,
    seed: Seed | None = None,
) -> Float[Tensor, "*batch Dout"]:
    """A linear layer with its low-rank update, on whose way alone numbers of x are dropped.

    Semantics: x @ weight.T + bias + scale * (drop(x) @ a.T) @ b.T; see `lora`.
    """
    return lora(F.linear(x, weight, bias), x, a, b, scale, dropout, seed)


@lora_linear.implementation("torch")
def _lora_linear_torch(x, weight, bias, a, b, scale, dropout=0.0, seed=None):
    if dropout:  # PyTorch has nothing better for it than the definition
        return lora(F.linear(x, weight, bias), x, a, b, scale, dropout, seed)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        tensors = cast_as_autocast(x, weight, bias, a, b)
        with torch.autocast(device, enabled=False):
            return _lora_linear_torch(*tensors, scale)
    y = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale)
    return y.view(*x.shape[:-1], y.shape[-1])


def cast_as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast here, where autograd sees it; inside the operation every product then has one dtype."""
    device = tensors[0].device.type
    low = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(low) for t in tensors]


class _LoRALinear(torch.autograd.Function):
    """`lora_linear` on rows x (N, Din), with a backward that computes only what is asked for.

    Matrices of R = 8 columns are where BLAS is slow, so each thin product is written with its long side N along the
    rows of memory: u^T = A x^T instead of u = x A^T, and dB^T = u^T g instead of dB = g^T u (12 times faster at
    Din = Dout = 1024, N = 2048, R = 8, one thread of an AMD Zen 4). The update is added into the base product, not
    beside it, and only x and u^T (R, N) are kept for the backward.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias, a, b, scale):
        ut = a @ x.to(a.dtype).t()  # (R, N)
        y = F.linear(x, weight, bias)
        if y.dtype == b.dtype:
            y.addmm_(ut.t(), b.t().contiguous(), alpha=scale)
        else:
            y.add_(ut.t() @ b.t(), alpha=scale)
        need_x, need_weight, _, need_a, need_b, _ = ctx.needs_input_grad
        ctx.scale = scale
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            a if need_x else None,
            b if need_x or need_a else None,
            ut if need_b else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g):
        x, weight, a, b, ut = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        thin = g.to(b.dtype if b is not None else ut.dtype) if need_x or need_a or need_b else None
        if need_x or need_a:
            grad_ut = (ctx.scale * b).t() @ thin.t()  # (R, N)
        if need_x:
            grad_x = g @ weight
            if grad_x.dtype == a.dtype:
                grad_x.addmm_(grad_ut.t(), a)
            else:
                grad_x.add_(grad_ut.t() @ a)
        if need_a:
            grad_a = grad_ut @ x.to(grad_ut.dtype)
        if need_b:
            grad_b = (ctx.scale * (ut @ thin)).t()
        if need_weight:
            grad_weight = g.t() @ x
        if need_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None
