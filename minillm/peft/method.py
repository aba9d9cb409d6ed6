"""What every way of tuning offers.

A method is a frozen config that can plan (say what would train, or refuse) and install (insert its modules). `tune`,
`merge`, `save_adapter` and the others do the rest in the same way for all of them.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from minillm.peft.names import names_of

PREFIX = "base_model.model."  # peft puts it before every name


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

    @property
    def touched(self) -> tuple[str, ...]:
        """What to name in a report of it."""
        return self.adapted + self.whole


class CannotMerge(ValueError):
    """The adapter cannot become part of the base's weights; the message says why."""


class Method(abc.ABC):
    """A way of tuning; its configs are frozen dataclasses."""

    name: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""  # in adapter_config.json: Hugging Face's word where they have one, else MINILLM_...
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""  # of the trainable values
    cannot_merge: ClassVar[str] = ""  # why not; empty where every wrapper can be folded into its base
    stacks: ClassVar[str] = "any"  # with which methods it can be on one model
    hub_type: ClassVar[str] = ""  # peft's word where it can read an export that is not how we save
    start: ClassVar[str] = ""  # why a model does not compute at the start what it computed before; empty if it does
    keeps_base: ClassVar[bool] = True  # False: it trains the base's own parameters, and nobody has a copy
    changes_base: ClassVar[bool] = False  # True: installing replaces frozen weights, such as by quantized ones

    @abc.abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """What would train in `model`, which stays untouched. Raises one ValueError listing all that is wrong."""

    @abc.abstractmethod
    def install(self, model: nn.Module, plan: Plan) -> None:
        """Insert what `plan` asks for. What it trains in place need not be copied: `tune` does that."""

    def penalty(self, tuning: Any, mask: Tensor | None) -> Tensor | None:
        """What an adapter (its `record.Tuning`) adds to the loss; `mask` (B, T): True at real tokens. None: nothing."""
        return None

    @property
    def callback(self) -> str:
        """The callback of `minillm.training` without which training would not do what the method says."""
        return ""

    @property
    def positions(self) -> int:
        """How many of a model's positions it takes from the text."""
        return 0

    @property
    def stands_on(self) -> tuple[str, ...]:
        """The names of other adapters that it cannot do without."""
        return ()

    def saved_as(self, tuning: Any) -> tuple["Method", dict[str, Tensor]]:
        """The config and the tensors that stand for a trained adapter (a `record.Tuning`) in its file: its own."""
        return self, {name: parameter.detach() for name, parameter in tuning.parameters().items()}

    def flatten(self, model: nn.Module, tuning: Any) -> None:
        """Put what a network of the adapter computes in the network's place; see `tune.flatten`."""
        raise ValueError(f"{tuning.name!r} is {self}: it has no network that makes its vectors, so it is flat")

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        """The fields of adapter_config.json that Hugging Face peft needs, where it knows the method."""
        return {}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "Method":
        """The config that peft described; ValueError for a field we cannot carry out."""
        raise ValueError(f"{cls.peft_type} is no method of peft's")

    def to_peft_tensors(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained tensors by the keys of the adapter's file; nothing may be lost."""
        return {PREFIX + name: tensor for name, tensor in tensors.items()}

    def from_peft_tensors(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back. A key that is none of this method's keeps its text, and will be reported as unexpected."""
        return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Method):
    """A way of tuning that leaves the base as it is. `trainable` names modules that train in full beside it.

    They are saved with it: a new head, for example. Each has its own copy, so switching adapters switches heads.
    """

    trainable: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self):
        refuse(self._problems(), f"{type(self).__name__}:")

    def _problems(self) -> list[str]:
        """All that is wrong with the config; may also bring fields into their normal form."""
        problems: list[str] = []
        object.__setattr__(self, "trainable", names_of("trainable", self.trainable, problems))
        return problems


def num_parameters(config: Method, model: nn.Module) -> int:
    """How many values `config` would train in `model`, by formula: nothing is built."""
    if not isinstance(config, Method):
        raise ValueError(f"num_parameters(config, model) takes a config such as LoraConfig() first, not {config!r}")
    return config.plan(model).count


def refuse(problems: Iterable[str], head: str, foot: str = "") -> None:
    """Raise one ValueError with a line for each problem, if there is any."""
    if lines := [f"  {problem}" for problem in dict.fromkeys(problems)]:
        raise ValueError("\n".join([head, *lines, *([foot] if foot else [])]))
