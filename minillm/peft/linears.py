"""What counts as a linear layer: torch's, the transposed one of the Hub's GPT-2, and a quantized one."""

import math

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b with a weight of its own (a subclass of nn.Linear may do something else)."""
    if is_conv1d(module) or is_quantized(module):
        return True
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "weight" in dict(module.named_parameters(recurse=False))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is (Din, Dout)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer that holds codes instead of numbers."""
    return hasattr(module, "dequantized") and hasattr(module, "in_features")


def coded_values(model: nn.Module) -> int:
    """How many weights the quantized layers of a model stand for: they are no parameters any more."""
    return sum(math.prod(features(module)) for module in model.modules() if is_quantized(module))


def features(layer: nn.Module) -> tuple[int, int]:
    """(Din, Dout) of a linear layer."""
    return tuple(layer.weight.shape) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def matrix(layer: nn.Module) -> Tensor:
    """Its weight as (Dout, Din)."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def adapter_dtype(layer: nn.Module) -> torch.dtype:
    """float32 at least: small updates would be lost in a bfloat16 adapter."""
    return torch.promote_types(_first(layer).dtype, torch.float32)


def device_of(layer: nn.Module) -> torch.device:
    """Where its weights are."""
    return _first(layer).device


def _first(layer: nn.Module) -> Tensor:
    """A floating-point tensor of the layer; float32 zero where it has none."""
    tensors = (*layer.parameters(), *layer.buffers())
    fallback = tensors[0] if tensors else torch.empty(())
    return next((t for t in tensors if t.is_floating_point()), torch.empty((), device=fallback.device))
