"""Rotary position embedding: a position is an angle by which pairs of features are turned."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.ops.registry import Op


def rotary_table(
    positions: Int[Tensor, "*B T"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Tensor, "*B T K2"], Float[Tensor, "*B T K2"]]:
    """Cosine and sine of the angles positions * theta^(-2i/K), i = 0 .. K/2 - 1, in float32.

    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of features: head_dim must be even, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


@Op
def rope(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "*#B T K2"], sin: Float[Tensor, "*#B T K2"]
) -> Float[Tensor, "B H T K"]:
    """Turn the feature pair (i, i + K/2) of every head by the angle of its position.

    Semantics: y[..., :K/2] = x1 cos - x2 sin,  y[..., K/2:] = x2 cos + x1 sin,  where x1, x2 = x.chunk(2, dim=-1).
    `cos` and `sin` come from `rotary_table`: (T, K/2) for all rows, or (B, T, K/2) when rows have their own positions.
    Source: Su et al. 2021 (arXiv:2104.09864). We pair halves, as Hub checkpoints do; the paper pairs neighbours.
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # one table for all heads of a row
    dtype = torch.promote_types(x.dtype, torch.float32)  # each output is a difference of two products
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
