"""A linear layer whose frozen weight is kept in 4 bits and turned into numbers where it is used."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from minillm.ops.int4 import Int4Tensor
from minillm.ops.quantize import QuantTensor
from minillm.ops.registry import Op


@Op
def quantized_linear(
    x: Float[Tensor, "*batch Din"], weight: QuantTensor | Int4Tensor, bias: Float[Tensor, "Dout"] | None
) -> Float[Tensor, "*batch Dout"]:
    """A linear layer with a quantized weight W (Dout, Din).

    Semantics: x @ W.T + bias, computed in the dtype of `x` (under autocast in autocast's). Gradients reach x and bias.
    """
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


@quantized_linear.implementation("torch")
def _quantized_linear_torch(x, weight, bias):
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _QuantizedLinear.apply(x, weight, None if bias is None else bias.to(x.dtype))


class _QuantizedLinear(torch.autograd.Function):
    """Makes the numbers of the weight again in the backward pass; autograd over the definition would keep them all.

    So training holds the 4-bit codes of every layer, and the numbers of one layer at a time.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias):
        ctx.weight = weight  # no copy, and nothing that trains: it need not pass through save_for_backward
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad):
        grad_x = grad @ ctx.weight.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias
