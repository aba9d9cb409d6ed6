"""Normalisation layers: the learned weights around `ops.rms_norm` and `ops.layer_norm`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm import ops


class RMSNorm(nn.Module):
    """y = weight * x / rms(x), over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """y = weight * (x - mean) / std + bias, over the last dimension (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
