"""Rotary position embedding: a position is an angle by which pairs of features are turned."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.ops.registry import Op


@dataclass(frozen=True)
class RopeScaling:
    """Slower turns, so that a model reads more positions than it was first trained on.

    kind "linear": every frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    kind "llama3": a frequency is kept if it turns more than `high_freq_factor` times within
    `original_max_positions`, divided by `factor` if fewer than `low_freq_factor` times, and a mixture of both
    between (Grattafiori et al. 2024, arXiv:2407.21783, Llama 3.1).
    """

    kind: Literal["linear", "llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind={self.kind!r}: rope scaling is linear or llama3")
        if not (1.0 <= self.factor < math.inf and 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf):
            raise ValueError(
                f"factor={self.factor} must be at least 1, and low_freq_factor={self.low_freq_factor} above 0 and "
                f"below high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(f"original_max_positions={self.original_max_positions} must be at least 1")

    def apply(self, frequencies: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """The scaled frequencies, in radians per position as they came."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequencies / self.factor, frequencies, kept.clamp(0.0, 1.0))


def rotary_table(
    positions: Int[Tensor, "*B T"], head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[Float[Tensor, "*B T K"], Float[Tensor, "*B T K"]]:
    """Cosine and sine of the angles positions * theta^(-2i/K), i = 0 .. K/2 - 1, in float32, ready for `rope`.

    Each stands twice, for the two features of pair i: (cos, cos) and, as the turn subtracts in the first, (-sin, sin).
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of features: head_dim must be even, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    angles = positions[..., None].float() * frequencies
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
