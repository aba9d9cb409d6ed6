"""Linear layers whose frozen weight is kept in 4 bits, and putting them in the place of ordinary ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from minillm.ops.int4 import Int4Tensor
from minillm.ops.quantize import QuantTensor, check_size, quantize_nf4
from minillm.ops.quantized import quantized_linear
from minillm.peft.linears import is_conv1d, is_linear, is_quantized
from minillm.peft.method import refuse
from minillm.peft.names import base_modules, collapse, find, names_of, tie, tied_parameters
from minillm.peft.record import record_of
from minillm.peft.replace import replace_modules
from minillm.peft.targets import ALL_LINEAR, HEADS, together

ALREADY = "is quantized already"


class QuantizedLinear(nn.Module):
    """x W^T + bias, with the codes and scales of W as buffers instead of a parameter `weight`.

    The numbers of W are made where they are used, in the dtype of `x`, and again in the backward pass. `.to(dtype)`
    changes the dtype of `weight` and casts the bias; codes and scales stay what they are.
    """

    def __init__(self, base: nn.Linear, quantized: QuantTensor | Int4Tensor):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self._format, self.bias = type(quantized), base.bias
        self.register_buffer("like", torch.empty(0, dtype=base.weight.dtype), persistent=False)  # has the dtype of W
        for leaf in self._leaves():  # code books are constants: what made the layer makes them again
            self.register_buffer(leaf, getattr(quantized, leaf), persistent=not leaf.startswith("book"))

    @property
    def quantized(self) -> QuantTensor | Int4Tensor:
        """The weight as it is kept."""
        tensors = map(self._buffers.__getitem__, self._leaves())  # at each call: past nn.Module's slow __getattr__
        return self._format(*tensors, shape=(self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """The weight as numbers, made for whoever reads it instead of calling the layer."""
        return self.dequantized()

    def dequantized(self) -> Tensor:
        """The weight as numbers (Dout, Din)."""
        return self.quantized.dequantize(self.like.dtype)

    def unquantized(self) -> nn.Linear:
        """A plain linear layer that computes the same: it has the rounded weight, the one before is gone."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.dequantized()), self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        bits = 8 * bytes_of(self) / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits:.2f} bits a weight"

    def _leaves(self) -> tuple[str, ...]:
        return self._format._fields[:-1]  # all but the shape

    def _apply(self, fn, recurse=True):
        before = {leaf: getattr(self, leaf) for leaf in self._leaves()}
        super()._apply(fn, recurse)
        for leaf, tensor in before.items():
            if tensor is not None and tensor.dtype != getattr(self, leaf).dtype:
                setattr(self, leaf, tensor.to(getattr(self, leaf).device))
        return self


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did: the layers now in 4 bits, those left as they are and why, and bytes of those it changed."""

    names: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        ratio = self.bytes_after / self.bytes_before
        head = f"{len(self.names)} layers: {self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.3f}x)"
        left = [f"not {problem}" for problem in together(self.skipped.items())]
        return "\n  ".join([head, *collapse(self.names), *left])


def quantize(
    model: nn.Module, targets: Sequence[str] = (ALL_LINEAR,), *, block: int = 64, double: bool = True
) -> QuantizeReport:
    """Put a QuantizedLinear in NF4 in the place of each linear layer that a target means; their float weights are gone.

    A target is the end of a path, whole segments, or "all-linear": each linear layer that can be quantized and is no
    output head. `block` and `double` as in `ops.quantize_nf4`. Raises one ValueError, with the model unchanged, for a
    target that matches nothing or what cannot be quantized, and for a model with adapters, whose base may not change.
    """
    check_size("block", block)
    problems: list[str] = []
    targets = names_of("targets", targets, problems) or ()
    modules = {name: own for name, _, own in base_modules(model)}
    named = find(modules, [target for target in targets if target != ALL_LINEAR], problems, "module")
    layers, others = quantizable(model)
    problems += [f"{name}: {others.get(name, 'is no linear layer')}" for name in named if name not in layers]
    if record_of(model) is not None:
        problems.append("it has adapters, which belong to the base as it is; merge(model) or unload(model) them first")
    bodies = [name for name in layers if not head(name)] if ALL_LINEAR in targets else []
    meant = {id(layer): layer for name, layer in layers.items() if name in named or name in bodies}
    chosen = {name: layer for name, layer in layers.items() if id(layer) in meant}  # in all of its places
    left = others | {name: "is an output head" for name in layers if name not in chosen and head(name)}
    if not chosen and not problems:
        problems = [f"{name or 'it'} {why}" for name, why in left.items()] or ["it has no linear layer"]
    refuse(problems, f"this {type(model).__name__} cannot be quantized so, and is unchanged:")
    before = sum(layer.weight.nbytes for layer in meant.values())
    new = replace_quantized(model, chosen, partial(quantize_nf4, block=block, double=double))
    after = sum(bytes_of(layer) for layer, _ in new)
    return QuantizeReport(tuple(chosen), left if ALL_LINEAR in targets else {}, before, after)


def quantizable(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers of the base that can be quantized by name, and for the others the reason why not."""
    layers, others, tied = {}, {}, tied_parameters(model)
    for name, _, layer in base_modules(model):
        if not is_linear(layer):
            continue
        if reason := why_not(name, layer, tied):
            others[name] = reason
        else:
            layers[name] = layer
    return layers, others


def why_not(name: str, layer: nn.Module, tied: Mapping[str, list[str]]) -> str | None:
    """Why a linear layer cannot be quantized, None if it can."""
    if is_quantized(layer):
        return ALREADY
    if is_conv1d(layer):
        return "is transformers' Conv1D; only nn.Linear can be quantized"
    if not name:
        return "is the whole model; put it into one, such as nn.Sequential(layer)"
    return tie(f"{name}.weight", tied) if f"{name}.weight" in tied else None


def head(name: str) -> bool:
    """Whether a name is that of an output layer, which QLoRA and others leave in full precision."""
    return name.rpartition(".")[2] in HEADS


def replace_quantized(
    model: nn.Module, layers: Mapping[str, nn.Linear], kept: Callable[[Tensor], QuantTensor | Int4Tensor]
) -> list[tuple[QuantizedLinear, nn.Linear]]:
    """Put a QuantizedLinear of `kept(weight)` in the place of each of `layers`; (the new one, the old one) of each."""
    made: list[tuple[QuantizedLinear, nn.Linear]] = []
    wanted = {id(layer) for layer in layers.values()}

    def make(name: str, layer: nn.Linear) -> QuantizedLinear:
        try:
            made.append((QuantizedLinear(layer, kept(layer.weight)), layer))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return made[-1][0]

    replace_modules(model, lambda _, module: id(module) in wanted, make)
    return made


def bytes_of(layer: QuantizedLinear) -> int:
    """What it holds of its weight, scales and code books included."""
    return sum(buffer.nbytes for buffer in layer.buffers(recurse=False))


def put_back(model: nn.Module, made: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Undo a replacement, given as (the new module, the old one)."""
    old = {id(new): module for new, module in made}
    replace_modules(model, lambda _, module: id(module) in old, lambda _, module: old[id(module)])
