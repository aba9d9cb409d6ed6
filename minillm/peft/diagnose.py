"""What can be wrong with a training set-up, by name."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from minillm.peft.in_place import FullConfig
from minillm.peft.names import Wrapper, collapse
from minillm.peft.record import record_of


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one step did to one parameter."""

    name: str
    dtype: torch.dtype
    count: int
    trainable: bool
    gradient: str  # "yes", "none" (no path from the loss), "zero", "B = 0" (zero, as it must be at a LoRA's start)
    changed: bool
    in_optimizer: bool | None  # None: no optimizer was given

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


def diagnose(model: nn.Module, probes: Sequence[Probe], loss: float, cut: bool) -> list[str]:
    """A sentence for each thing that is wrong, beginning with its name and ending with the parameters it is about.

    `cut` says that reentrant checkpointing warned of blocks whose inputs need no gradient.
    """
    record = record_of(model)
    trains = [p for p in probes if p.trainable]
    full = record is not None and any(isinstance(t.config, FullConfig) for t in record.tunings.values())
    found: list[str] = []

    def add(condition: Any, name: str, advice: str, about: Iterable[Probe] = ()) -> None:
        if condition:
            names = ", ".join(collapse(p.name for p in about))
            found.append(f"{name}: {advice}" + (f" ({names})" if names else ""))

    add(not math.isfinite(loss), "the loss is not finite", f"it is {loss}")
    add(not trains, "nothing trains", "every parameter is frozen; tune(model, config) lets some train")
    add(
        trains and len(trains) == len(probes) and not full,
        "everything trains",
        "no parameter is frozen: right for pretraining; to tune, call tune(model, config) first",
    )
    add(
        _has_no_adapter(model, probes, trains),
        "adapter matched nothing",
        "the model holds no adapter; was a module replaced after tune(), or the adapter merged?",
    )
    add(
        cut,
        "no gradient through checkpointing",
        "reentrant checkpointing of a block whose input needs no gradient gives none to the adapters inside; "
        "call torch.utils.checkpoint with use_reentrant=False",
    )
    lost = [p for p in trains if p.gradient in ("none", "zero")]
    add(lost, "trainable but no gradient", "the loss does not depend on them", lost)
    missing = [p for p in trains if p.in_optimizer is False]
    add(missing, "adapter not in the optimizer", "build the optimizer after tune(), from what trains", missing)
    idle = [p for p in probes if not p.trainable and p.in_optimizer]
    add(idle, "frozen but in the optimizer", "build the optimizer after tune(), from what trains", idle)
    still = [p for p in trains if p.gradient == "yes" and not p.changed and p.in_optimizer is not False]
    add(still, "gradient but no change", "the learning rate is 0 or the step too small for the dtype", still)
    moved = [p for p in probes if not p.trainable and p.changed]
    add(moved, "frozen but changed", "something writes to these weights", moved)
    return found


def _has_no_adapter(model: nn.Module, probes: Sequence[Probe], trains: Sequence[Probe]) -> bool:
    """Whether adapters were planned and none is there; without a plan, whether all is frozen and nothing is wrapped."""
    if (record := record_of(model)) is None:
        return not trains and not any(isinstance(module, Wrapper) for module in model.modules())
    planned = [
        p
        for t in record.tunings.values()
        if t.trains
        for n, p in t.parameters().items()
        if n not in record.required_grad
    ]
    there = {id(p) for p in model.parameters()}
    return bool(planned) and not any(id(p) in there for p in planned)
