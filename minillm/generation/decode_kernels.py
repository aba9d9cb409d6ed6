"""Which layers of a model our native kernels compute, asked once for a whole generation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minillm import ops
from minillm.peft.linears import is_quantized
from minillm.peft.lora_linear import LoRALinear

Kernel = Callable[[Tensor], Tensor]


@torch.no_grad()
def kernel_of(layer: nn.Module, rows: int) -> Kernel | None:
    """What computes `layer` in the place of its `forward`, for x (rows, 1, Din) and no gradient; None: no kernel does.

    To ask at each token what may run a layer costs as much as the product of a small one.
    """
    if type(layer) is LoRALinear:
        return _adapted(layer, rows)
    if type(layer) is nn.Linear:
        return _chosen(ops.linear, rows, layer.weight, weight=layer.weight, bias=layer.bias)
    if is_quantized(layer):
        return _chosen(ops.quantized_linear, rows, layer.like, weight=layer.quantized, bias=layer.bias)
    return None


def _chosen(op: ops.Op, rows: int, like: Tensor, **arguments) -> Kernel | None:
    """The op's kernel with all arguments but x, which has the type of `like`."""
    weight = arguments["weight"]
    runs = op.runs_natively(like.new_empty(rows, 1, weight.shape[1]), **arguments)
    return partial(op.kernel.run, **arguments) if runs else None


def _adapted(layer: LoRALinear, rows: int) -> Kernel | None:
    base, a, b, scale = layer.base, layer.lora_A, layer.lora_B, layer.scale
    if type(base) is nn.Linear:
        return _chosen(ops.lora_linear, rows, base.weight, weight=base.weight, bias=base.bias, a=a, b=b, scale=scale)
    kernel = kernel_of(base, rows) if is_quantized(base) and a.dtype == base.like.dtype else None
    return kernel and partial(_with_update, kernel, a.t(), b.t(), scale)


def _with_update(base: Kernel, at: Tensor, bt: Tensor, scale: float, x: Tensor) -> Tensor:
    """base(x) + scale * (x A^T) B^T, added into what the base gave."""
    y = base(x)
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ at, bt, alpha=scale)
    return y
