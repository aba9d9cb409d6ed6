"""Rotary position embedding: a position is an angle by which pairs of features are turned."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.ops.registry import Op


def rotary_table(
    positions: Int[Tensor, "*B T"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Tensor, "*B T K"], Float[Tensor, "*B T K"]]:
    """Cosine and sine of the angles positions * theta^(-2i/K), i = 0 .. K/2 - 1, in float32, ready for `rope`.

    Each stands twice, for the two features of pair i: (cos, cos) and, as the turn subtracts in the first, (-sin, sin).
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of features: head_dim must be even, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@Op
def rope(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "*#B T K"], sin: Float[Tensor, "*#B T K"]
) -> Float[Tensor, "B H T K"]:
    """Turn the feature pair (i, i + K/2) of every head by the angle of its position.

    Semantics: y[i] = x[i] cos - x[i + K/2] sin,  y[i + K/2] = x[i + K/2] cos + x[i] sin.
    `cos` and `sin` come from `rotary_table`: (T, K) for all rows, or (B, T, K) when rows have their own positions.
    Positions are not trained: only x is sure to receive a gradient.
    Source: Su et al. 2021 (arXiv:2104.09864), equation 34. We pair halves, as Hub checkpoints do; the paper neighbours.
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # one table for all heads of a row
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # each output is a difference of two products
    partner = wide.roll(x.shape[-1] // 2, dims=-1)
    return (wide * cos + partner * sin).to(x.dtype)


@rope.implementation("torch")
def _rope_torch(x, cos, sin):
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)


class _Rope(torch.autograd.Function):
    """The gradient of a turn is the turn back: the backward pass needs nothing but the table."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rope.apply(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition with one buffer less; y lies in memory as x does, which spares attention's output a copy."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
