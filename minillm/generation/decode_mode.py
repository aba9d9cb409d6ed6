"""The state a model is in while it computes one step of generation, and only then."""

import torch
from torch import Tensor, nn

from minillm.generation.decode_kernels import kernel_of


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
        self.native = {module: kernel for module in layers if (kernel := kernel_of(module, rows))}
        fetched = {id(kernel.keywords.get("weight")) for kernel in self.native.values()}
        weights = {id(m.weight): m.weight for m in layers if type(m) is nn.Linear and id(m.weight) not in fetched}
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


def _gains(weight: Tensor) -> bool:
    measured = weight.device.type == "cpu" and weight.dtype == torch.float32
    out_features, in_features = weight.shape
    return measured and out_features > in_features and weight.is_contiguous()
