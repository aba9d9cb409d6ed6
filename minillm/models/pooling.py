"""From the hidden states of all tokens to the one that stands for the text."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.ops import ACTIVATIONS

POOLS = ("first", "last", "mean")
DENSE = {"tanh": torch.tanh, "relu": torch.relu, "gelu": ACTIVATIONS["gelu"]}


class Pooler(nn.Module):
    """From the states of all tokens to one that stands for the text, by the rules of `heads.HeadConfig`."""

    def __init__(self, hidden_size: int, pool: str, dense: str | None):
        super().__init__()
        self.pool, self.activation = pool, DENSE.get(dense)
        self.dense = nn.Linear(hidden_size, hidden_size) if dense else None

    def forward(self, states: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B D"]:
        """`mask` is True at real tokens; padding may stand on either side."""
        pooled = self._pooled(states, mask)
        return pooled if self.dense is None else self.activation(self.dense(pooled))

    def _pooled(self, states: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if self.pool == "mean":
            real = mask[..., None].to(states.dtype)
            return (states * real).sum(1) / real.sum(1).clamp(min=1)
        return states[torch.arange(len(states), device=states.device), self.position(mask)]

    def position(self, mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B"]:
        """Which state of each row stands for it, where it is one: that of the first or of the last real token."""
        order = torch.arange(mask.shape[1], device=mask.device)
        order = order if self.pool == "last" else order.flip(0)
        return torch.where(mask, order, -1).argmax(1)
