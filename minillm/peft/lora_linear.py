"""The LoRA layer: a frozen linear layer plus a trainable low-rank update.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
"""

import math

import torch
from torch import Tensor, nn

from minillm.ops import lora, lora_linear
from minillm.peft.names import Wrapper


class LoRALinear(Wrapper):
    """base(x) + scale * B A dropout(x), with A (R, Din) random and B (Dout, R) zero: at first nothing changes.

    scale = alpha / R, or alpha / sqrt(R) with `rslora`. The adapter is float32 at least, also on a bfloat16 base.
    A starts as loralib's and peft's does, uniform within 1 / sqrt(Din) of 0; the paper says Gaussian.
    Base and update are one operation, so a hook registered on the base does not run: register it on this layer.
    Raises ValueError for a rank that the layer cannot have.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if problem := rank_problem(rank, base):
            raise ValueError(problem)
        self.base, self.rank = base, rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        where = {"dtype": adapter_dtype(base), "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the bound is then 1 / sqrt(Din)

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.dropout.p > 0
        if drops or type(self.base).forward is not nn.Linear.forward:  # the base may have been wrapped since
            return lora(self.base(x), self.dropout(x), self.lora_A, self.lora_B, self.scale)
        return lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)

    @property
    def weight(self) -> Tensor:
        """The merged weight W + scale * B A: summed in float32 at least, rounded once to the dtype of W.

        Code that reads a layer's weight instead of calling the layer (a loss fused with the output head,
        nn.MultiheadAttention) is thereby right too, but for dropout, and sends gradients to A and B.
        """
        wide = torch.promote_types(self.base.weight.dtype, self.lora_A.dtype)
        update = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return (self.base.weight.to(wide) + self.scale * update).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def rank_problem(rank: int, base: nn.Linear) -> str | None:
    """Why `base` cannot have an adapter of this rank, None if it can."""
    limit = min(base.in_features, base.out_features)
    if 1 <= rank <= limit:
        return None
    return f"rank {rank} is outside 1..{limit}, the ranks a {base.out_features} x {base.in_features} matrix can have"


def adapter_dtype(base: nn.Linear) -> torch.dtype:
    """float32 at least: small updates would be lost in a bfloat16 adapter."""
    return torch.promote_types(base.weight.dtype, torch.float32)
