"""Folding adapters into the weights they adapt, for good or for a time."""

import torch
from torch import nn

from minillm.peft.lora_linear import LoRALinear
from minillm.peft.method import forget, refuse, require_tuning
from minillm.peft.names import original_modules
from minillm.peft.replace import replace_modules


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = False) -> float:
    """Make every adapted layer a plain linear layer with weight W + scale * B A; the largest change of a weight.

    The sum is made in float32 at least and rounded once, to the dtype of W: on a bfloat16 base that rounding is the
    difference that remains. The model has the base's modules and names again and is no longer tuned; with `keep` it
    remembers adapters and original weights (twice the memory of the adapted layers), and `unmerge` brings them back.
    What was trained in place is part of the base as it stands. Raises ValueError when there is nothing to merge, or
    when a merged weight would not be finite.
    """
    tuning = require_tuning(model, "merge")
    if tuning.merged is not None:
        raise ValueError("this model is merged already; unmerge(model) gives the adapters back")
    layers = [(name, module) for name, _, module in original_modules(model) if isinstance(module, LoRALinear)]
    refuse(
        [f"{name}: NaN or infinity" for name, layer in layers if not layer.weight.isfinite().all()],
        "merging would spoil the base, which is unchanged; load an earlier adapter:",
    )
    kept, changes = [], [0.0]

    def make(name: str, layer: LoRALinear) -> nn.Linear:
        original, merged = layer.base.weight.detach().clone(), layer.weight
        changes.append((merged - original).abs().max().item())
        layer.base.weight.copy_(merged)
        kept.append((layer, original))
        return layer.base

    replace_modules(model, lambda name, module: isinstance(module, LoRALinear), make)
    if keep:
        tuning.merged = kept
    else:
        forget(model)
    return max(changes)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge(model, keep=True)`: the adapters are back, and the base's weights bit for bit what they were."""
    tuning = require_tuning(model, "unmerge")
    if tuning.merged is None:
        raise ValueError("this model is not merged: unmerge undoes merge(model, keep=True), and nothing else")
    adapted = {id(layer.base): layer for layer, _ in tuning.merged}
    replace_modules(model, lambda _, module: id(module) in adapted, lambda _, module: adapted[id(module)])
    for layer, original in tuning.merged:
        layer.base.weight.copy_(original)
    tuning.merged = None
