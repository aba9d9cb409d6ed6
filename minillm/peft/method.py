"""What every way of tuning offers, and what a tuned model remembers of it.

A method is a frozen config that can plan (say what would train, or refuse) and install (insert its modules). `tune`,
`save_adapter` and the others do the rest in the same way for all of them.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from minillm.peft.names import Wrapper, every_parameter


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a method would change: modules it adapts, modules it trains in full, and every parameter that would train.

    Names are original paths. The parameters are tensors on torch's meta device: a shape and a dtype, known before
    anything is inserted.
    """

    adapted: tuple[str, ...]
    whole: tuple[str, ...]
    parameters: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """The number of trainable values, by formula."""
        return sum(parameter.numel() for parameter in self.parameters.values())


class Method(abc.ABC):
    """A way of tuning; its configs are frozen dataclasses."""

    name = ""
    peft_type = ""  # in adapter_config.json: Hugging Face's word where they have one, else MINILLM_...

    @abc.abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """What would train in `model`, which stays untouched. Raises one ValueError listing all that is wrong."""

    @abc.abstractmethod
    def install(self, model: nn.Module, plan: Plan) -> None:
        """Insert what `plan` asks for; what the model computes must not change yet."""

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        """The fields of adapter_config.json that Hugging Face peft needs, where it knows the method."""
        return {}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "Method":
        """The config that peft described; ValueError for a field we cannot carry out."""
        raise ValueError(f"{cls.peft_type} is no method of peft's")


@dataclasses.dataclass
class Tuning:
    """What a tuned model remembers, so that it can be saved, merged and given back as it was."""

    config: Method
    plan: Plan
    required_grad: dict[str, bool]  # of the base's parameters, before tuning
    merged: list[tuple[Wrapper, Tensor]] | None = None  # adapted layer, original weight: while merged for a time


def tuning_of(model: nn.Module) -> Tuning | None:
    """The record that `tune` left on the model, None where there is none."""
    return vars(model).get("_tuning")


def require_tuning(model: nn.Module, act: str) -> Tuning:
    """The record that `tune` left, or a ValueError saying that there is nothing to `act` on."""
    if (tuning := tuning_of(model)) is None:
        raise ValueError(f"nothing to {act}: this {type(model).__name__} is not tuned (tune() or load_adapter() first)")
    return tuning


def forget(model: nn.Module) -> None:
    """Make the model an untuned one: no record, and each parameter that the base had trains as it did before."""
    tuning = require_tuning(model, "forget")
    for name, parameter in every_parameter(model):
        before = tuning.required_grad.get(name, parameter.requires_grad)
        if before != parameter.requires_grad:
            parameter.requires_grad_(before)
    del model._tuning


def refuse(problems: Iterable[str], head: str, foot: str = "") -> None:
    """Raise one ValueError with a line for each problem, if there is any."""
    if lines := [f"  {problem}" for problem in dict.fromkeys(problems)]:
        raise ValueError("\n".join([head, *lines, *([foot] if foot else [])]))
