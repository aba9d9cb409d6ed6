"""Normalisation of one feature vector at a time."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minillm.ops.registry import Op


@Op
def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*B D"]:
    """Scale x to root mean square 1, then by `weight`: y = weight * x / sqrt(mean(x^2) + eps).

    Half-precision input is normalised in float32 and rounded before the weight.
    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@Op
def layer_norm(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], bias: Float[Tensor, "D"] | None, eps: float
) -> Float[Tensor, "*B D"]:
    """Shift x to mean 0, scale it to variance 1 (the biased one), then y = weight * x + bias.

    Source: Ba et al. 2016 (arXiv:1607.06450), equation 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return y if bias is None else y + bias


@layer_norm.implementation("torch")
def _layer_norm_torch(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
