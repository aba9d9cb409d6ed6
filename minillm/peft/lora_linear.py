"""The LoRA layer: a frozen linear layer plus a trainable low-rank update.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
"""

import math

import torch
from torch import Tensor, nn

from minillm.ops import dropout_seed, lora, lora_linear
from minillm.peft.linears import adapter_dtype, device_of, features, is_conv1d
from minillm.peft.names import Wrapper, innermost


class LoRALinear(Wrapper):
    """base(x) + scale * B A dropout(x), with A (R, Din) random and B (Dout, R) zero: at first nothing changes.

    scale = alpha / R, or alpha / sqrt(R) with `rslora`. The adapter is float32 at least, also on a bfloat16 base.
    A starts as loralib's and peft's does, uniform within 1 / sqrt(Din) of 0; the paper says Gaussian.
    Base and update are one operation, so a hook registered on the base does not run: register it on this layer.
    Raises ValueError for a rank that the layer cannot have.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        layer = innermost(base)
        self.in_features, self.out_features = features(layer)
        if problem := rank_problem(rank, self.in_features, self.out_features):
            raise ValueError(problem)
        self.base, self.rank = base, rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.transposed = is_conv1d(layer)
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the bound is then 1 / sqrt(Din)

    def forward(self, x: Tensor) -> Tensor:
        update = (self.lora_A, self.lora_B, self.scale)
        if type(self.base).forward is nn.Linear.forward:
            operation, arguments = lora_linear, (x, self.base.weight, self.base.bias, *update)
        else:  # the base may be no plain layer
            operation, arguments = lora, (self.base(x), x, *update)
        p = self.dropout.p if self.dropout.training else 0.0
        if not p:
            return operation(*arguments)
        if operation.runs_natively(*arguments, p, 0):
            return operation(*arguments, p, dropout_seed())
        y = self.base(x) if operation is lora_linear else arguments[0]
        return lora(y, self.dropout(x), *update)  # what nn.Dropout draws costs PyTorch less than what a seed says

    @property
    def weight(self) -> Tensor:
        """The merged weight W + scale * B A: summed in float32 at least, rounded once to the dtype of W.

        Code that reads a layer's weight instead of calling the layer (a loss fused with the output head,
        nn.MultiheadAttention) is thereby right too, but for dropout, and sends gradients to A and B.
        """
        base = self.base.weight
        wide = torch.promote_types(base.dtype, self.lora_A.dtype)
        update = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return (base.to(wide) + self.scale * (update.t() if self.transposed else update)).to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def folded(self) -> dict[str, Tensor]:
        """The merged weight."""
        return {"weight": self.weight}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def rank_problem(rank: int, size_in: int, size_out: int) -> str | None:
    """Why a layer of these sizes cannot have an adapter of this rank, None if it can."""
    limit = min(size_in, size_out)
    if 1 <= rank <= limit:
        return None
    return f"rank {rank} is outside 1..{limit}, the ranks a {size_out} x {size_in} matrix can have"
