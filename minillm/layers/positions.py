"""How a model knows the order of its tokens: learned and sinusoidal vectors added to the embeddings.

Rotary positions enter inside attention instead: `ops.rotary_table` and `ops.rope`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """One trained vector for each position, as in GPT-2 and BERT; `max_positions` is a hard limit."""

    def __init__(self, max_positions: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size).normal_(std=0.02))

    def forward(self, positions: Int[Tensor, "*B T"]) -> Float[Tensor, "*B T D"]:
        return nn.functional.embedding(positions, self.weight)


class SinusoidalPositions(nn.Module):
    """Fixed vectors of sines (even features) and cosines (odd features) with wavelengths from 2 pi to 10000 * 2 pi.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5. It has no parameters and no limit.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, positions: Int[Tensor, "*B T"]) -> Float[Tensor, "*B T D"]:
        exponents = torch.arange(0, self.hidden_size, 2, device=positions.device) / self.hidden_size
        angles = positions[..., None] / 10000.0**exponents  # (.., T, D/2 rounded up)
        pairs = torch.stack([angles.sin(), angles.cos()], dim=-1)
        return pairs.flatten(-2)[..., : self.hidden_size]  # an odd D has one sine more than cosines
