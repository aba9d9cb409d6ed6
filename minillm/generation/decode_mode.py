"""The state a model is in while it computes one step of generation, and only then."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minillm import ops
from minillm.peft.linears import is_quantized


class DecodeMode:
    """Inside `with` blocks: eval mode, no gradients, and weights laid out for reading one vector at a time.

    Decoding multiplies each weight matrix with one vector per row of the batch, so its time is that of fetching the
    matrix from memory. For few rows our native kernels, where they are built, fetch it as it lies, in numbers or in 4
    bits, at the speed of a copy. Else: `nn.Linear` stores (out, in) row by row; for out > in, storing it column by
    column gives fewer, longer runs, which the CPU fetches up to 2.6 times as fast (8192 x 256, float32, measured with
    MKL on an AMD EPYC). So such weights are copied once into that order; the values, shapes and names stay. The copies
    cost their memory until generation ends. Outside the block every module is in the mode it was in and has its own
    memory back.

    `rows` is the size of the batch. `prepare`: whether generation is long enough for the copies to pay.
    """

    def __init__(self, model: nn.Module, *, rows: int, prepare: bool):
        self.training = [module for module in model.modules() if module.training]
        layers = list(model.modules()) if prepare else []
        kernels = {module: _kernel(module, rows) for module in layers}
        self.native = {module: kernel for module, kernel in kernels.items() if kernel}
        plain = [module for module in layers if type(module) is nn.Linear]
        fetched = {id(module.weight) for module in plain if module in self.native}
        weights = {id(module.weight): module.weight for module in plain if id(module.weight) not in fetched}
        self.swapped: list[tuple[nn.Parameter, Tensor, Tensor]] = [
            (w, w.data, w.data.t().contiguous().t()) for w in weights.values() if _gains(w)
        ]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False
        for weight, _, columns in self.swapped:
            weight.data = columns
        for module in self.native:
            module.__dict__["forward"] = self.native[module]  # past nn.Module's __setattr__, at each token
        self.inference = torch.inference_mode()
        self.inference.__enter__()

    def __exit__(self, *error) -> None:
        self.inference.__exit__(*error)
        for weight, rows, _ in self.swapped:
            weight.data = rows
        for module in self.native:
            del module.__dict__["forward"]  # the class's shows again
        for module in self.training:
            module.training = True


@torch.no_grad()
def _kernel(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor] | None:
    """What computes this layer at once, without asking at each token what may run it; None if no kernel does."""
    if type(layer) is nn.Linear:
        op, weight, like = ops.linear, layer.weight, layer.weight
    elif is_quantized(layer):
        op, weight, like = ops.quantized_linear, layer.quantized, layer.like
    else:
        return None
    if not op.runs_natively(like.new_empty(rows, layer.in_features), weight, layer.bias):
        return None
    return partial(op.kernel.run, weight=weight, bias=layer.bias)


def _gains(weight: Tensor) -> bool:
    measured = weight.device.type == "cpu" and weight.dtype == torch.float32
    out_features, in_features = weight.shape
    return measured and out_features > in_features and weight.is_contiguous()
