"""How a model knows the order of its tokens: vectors added to the embeddings, or biases added to attention's scores.

Rotary positions enter inside attention instead: `ops.rotary_table` and `ops.rope`.
"""

import math

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


class RelativePositions(nn.Module):
    """A learned bias on each head's scores for how far a key lies from the query: T5's, one table for all layers.

    Near distances have a bucket each; farther ones share buckets whose width grows by a constant factor up to
    `max_distance`, beyond which all share one. `bidirectional` gives half of the buckets to keys behind the query;
    otherwise all later keys count as distance 0, for a causal mask to hide.
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, bidirectional: bool):
        super().__init__()
        exact = num_buckets // (4 if bidirectional else 2)
        if not 1 <= exact < max_distance:
            raise ValueError(
                f"num_buckets={num_buckets} must be at least {4 if bidirectional else 2}, and max_distance="
                f"{max_distance} more than the {exact} distances that have a bucket each"
            )
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads).normal_(std=0.02))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def forward(self, num_queries: int, num_keys: int) -> Float[Tensor, "1 H T S"]:
        """The bias of T queries, the newest of S positions, for all S keys."""
        device = self.weight.device
        queries = torch.arange(num_keys - num_queries, num_keys, device=device)
        offsets = torch.arange(num_keys, device=device) - queries[:, None]  # (T, S), above 0 for later keys
        return nn.functional.embedding(self.buckets(offsets), self.weight).permute(2, 0, 1)[None]

    def buckets(self, offsets: Int[Tensor, "T S"]) -> Int[Tensor, "T S"]:
        """The bucket of each key position minus query position."""
        count = len(self.weight)
        if self.bidirectional:
            count //= 2
            return torch.where(offsets > 0, count, 0) + self._by_distance(offsets.abs(), count)
        return self._by_distance((-offsets).clamp(min=0), count)

    def _by_distance(self, distance: Tensor, count: int) -> Tensor:
        exact = count // 2  # the half of the buckets that hold one distance each
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = exact + (growth * (count - exact)).long()
        return torch.where(distance < exact, distance, far.clamp(max=count - 1))
