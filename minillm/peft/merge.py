"""Folding adapters into the weights they adapt, for good or for a time."""

import torch
from torch import Tensor, nn

from minillm.peft.method import CannotMerge, refuse
from minillm.peft.names import Wrapper, places
from minillm.peft.record import Folded, Record, forget, require_record
from minillm.peft.replace import replace_modules


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = False) -> float:
    """Make every adapted layer a plain one, such as a linear layer with W + scale * B A; the largest change of a value.

    The sum is made in float32 at least and rounded once, to the dtype of W: on a bfloat16 base that rounding is the
    difference that remains. A quantized layer becomes one of plain numbers, since its codes could not hold the sum.
    The model has the base's modules and names again and is no longer tuned; with `keep` it remembers adapters and
    original weights (twice the memory of the adapted layers), and `unmerge` brings them back. What was trained in place
    is part of the base as it stands. Raises CannotMerge for methods that no weight can express, and ValueError when
    there is nothing to merge, an adapter is not active, or a merged weight would not be finite.
    """
    record = require_record(model, "merge")
    if record.merged is not None:
        raise ValueError("this model is merged already; unmerge(model) gives the adapters back")
    _check(record)
    done: list[Folded] = []
    changes, spoilt = [0.0], []
    try:
        for name, wrapper in _inside_out(model):
            values = wrapper.folded()
            if all(value.isfinite().all() for value in values.values()):
                changes.append(_fold(model, wrapper, values, done))
            else:
                spoilt.append(f"{name}: NaN or infinity")
        refuse(spoilt, "merging would spoil the base, which is unchanged; load an earlier adapter:")
    except BaseException:
        _unfold(model, done)
        raise
    if keep:
        record.merged = done
    else:
        forget(model)
    return max(changes)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge(model, keep=True)`: the adapters are back, and the base's weights bit for bit what they were."""
    record = require_record(model, "unmerge")
    if record.merged is None:
        raise ValueError("this model is not merged: unmerge undoes merge(model, keep=True), and nothing else")
    _unfold(model, record.merged)
    record.merged = None


def _check(record: Record) -> None:
    idle = [f"{name!r} is not active" for name, tuning in record.tunings.items() if not tuning.active]
    refuse(idle, "merging would change the base under other adapters; activate or unload them first:")
    why = [f"{name!r}: {t.config.name}: {t.config.cannot_merge}" for name, t in record.tunings.items()]
    if why := [line for line, t in zip(why, record.tunings.values(), strict=True) if t.config.cannot_merge]:
        raise CannotMerge("\n  ".join(["this model cannot be merged; it is unchanged:", *why]))


def _inside_out(model: nn.Module) -> list[tuple[str, Wrapper]]:
    """(original path, wrapper) of every wrapper once, one inside another before it."""
    found = {id(p.module): (p.name, p.module) for p in places(model) if isinstance(p.module, Wrapper)}
    return list(reversed(found.values()))


def _fold(model: nn.Module, wrapper: Wrapper, values: dict[str, Tensor], done: list[Folded]) -> float:
    """Put the wrapper's values into its base and the base into its place; the largest change of a value."""
    base = wrapper.base
    if not values.keys() <= _tensors(base).keys():  # codes cannot hold the sum
        base = base.unquantized()
    tensors = _tensors(base)
    done.append((wrapper, base, {leaf: tensors[leaf].detach().clone() for leaf in values}))
    change = max((value - tensors[leaf]).abs().max().item() for leaf, value in values.items())
    for leaf, value in values.items():
        tensors[leaf].copy_(value)
    replace_modules(model, lambda _, module: module is wrapper, lambda _, module: base)
    return change


def _unfold(model: nn.Module, done: list[Folded]) -> None:
    for wrapper, base, originals in reversed(done):
        for leaf, original in originals.items():
            _tensors(base)[leaf].copy_(original)
        replace_modules(model, lambda _, module, base=base: module is base, lambda _, module, w=wrapper: w)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
