"""`tune` puts an adapter on a model and lets exactly that train; `activate` switches; `unload` gives the base back."""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from minillm.peft.method import Method, refuse
from minillm.peft.names import (
    DEFAULT,
    Gate,
    Wrapper,
    collapse,
    every_parameter,
    original_modules,
    original_parameters,
    places,
)
from minillm.peft.record import (
    Record,
    Slot,
    Tuning,
    added,
    arrange,
    choose,
    forget,
    record_of,
    require_record,
    set_training,
    tunings_of,
)


class Methods(Mapping[str, type[Method]]):
    """Every method by name; its file is imported when it is asked for."""

    def __init__(self, places: Mapping[str, str]):
        self._places = places

    def __getitem__(self, name: str) -> type[Method]:
        module, cls = self._places[name].split(".")
        return getattr(importlib.import_module(f"minillm.peft.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS = Methods(
    {
        "lora": "lora.LoraConfig",
        "full": "in_place.FullConfig",
        "partial": "in_place.PartialConfig",
    }
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `tune` did: the modules it touched (original paths) and how many of the model's values train."""

    method: str
    modules: tuple[str, ...]
    trainable: int
    total: int  # the adapters' own values included

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        head = f"{self.method}: {self.trainable:,} of {self.total:,} values train ({self.percent:.2f} %)"
        return "\n  ".join([head, *collapse(self.modules)])


def tune(model: nn.Module, config: Method, name: str = DEFAULT) -> Report:
    """Freeze `model`, insert what `config` asks for and let exactly that train. Load the base's weights before.

    Works in place on any module. At the start the model computes what it computed before, unless the method's `start`
    says why not. With a `name` of its own a second adapter stands on top of those that are active, which then stay as
    they are (`activate(model, "a", "b")` trains both). Raises ValueError when the model has an adapter of that name or
    the config does not fit it; after any error the model is what it was.

    Example: `print(tune(model, LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"))))`
    """
    record = record_of(model)
    refuse(taken(record, name), "this model is tuned already; merge(model) or unload(model) it first:")
    inner = [name for name, _, module in original_modules(model) if module is not model and record_of(module)]
    refuse(
        [f"{name} is tuned by itself; unload(model.{name}) it first" for name in inner],
        f"parts of this {type(model).__name__} are tuned already:",
    )
    plan = config.plan(model)
    if record is None:
        record = Record({name: parameter.requires_grad for name, parameter in every_parameter(model)})
    tuning = Tuning(name, config, plan, record.active)
    states = [(other, other.trains) for other in record.tunings.values()]
    stood = _slots(model)
    if config.changes_base:
        from minillm.peft.fingerprint import fingerprint

        tuning.fingerprint = fingerprint(model, tuning)
    known = {id(module) for _, module in added(model)}
    model._tuned = record
    record.tunings[name] = tuning
    try:
        config.install(model, plan)
        _collect(model, tuning, known)
        tuning.slots = _own_copies(tuning, stood, _slots(model))
        for other, _ in states:
            other.trains = False
        set_training(model, record)
        trainable = sum(parameter.numel() for parameter in tuning.parameters().values())
        assert trainable == plan.count, f"{trainable} values train, the formula says {plan.count}"
        total = sum(parameter.numel() for parameter in original_parameters(model).values())
    except BaseException:
        _collect(model, tuning, known)
        for other, trains in states:
            other.trains = trains
        _drop(model, record, [name])
        for slot in stood.values():
            slot.put(own=False)
        raise
    return Report(config.name, plan.adapted + plan.whole, trainable, total)


def activate(model: nn.Module, *names: str, train: Iterable[str] | None = None) -> None:
    """Let the model compute with these adapters, in the order of their adding, and without the others.

    None at all: the base. They train, or those of them that `train` names. Raises ValueError for unknown names.
    """
    record = require_record(model, "activate")
    train = tuple(names if train is None else train)
    problems = [f"there is no adapter {name!r}" for name in (*names, *train) if name not in record.tunings]
    problems += [f"{name!r} is to train, but not to be active" for name in train if name not in names]
    problems += ["it is merged for a time; unmerge(model) first"] if record.merged is not None else []
    known = ", ".join(map(repr, record.tunings))
    refuse(problems, f"these adapters cannot be activated; the model has {known}:")
    arrange(model, record, names, train)


def unload(model: nn.Module, name: str | None = None) -> None:
    """Drop an adapter, or without a name all: modules, weights, requires_grad are bit for bit those from before `tune`.

    Raises ValueError where the method trained weights of the base itself, which nobody kept (load the base again), and
    where another adapter was trained on top of this one.
    """
    record = require_record(model, "unload")
    gone = list(record.tunings) if name is None else [choose(model, name, "unload").name]
    for tuning in (record.tunings[other] for other in gone):
        lost = [] if tuning.config.keeps_base else list(tuning.plan.parameters)
        refuse(
            collapse(lost), f"{tuning.config.name} tuning trained the base's own weights; load the base again to undo:"
        )
    above = [
        f"{other.name!r} was trained on top of {name!r}; unload {other.name!r} first"
        for other in record.tunings.values()
        if name in other.under and other.name not in gone
    ]
    refuse(above, f"the adapter {name!r} cannot be unloaded:")
    if record.merged is not None:
        from minillm.peft.merge import unmerge

        unmerge(model)
    _drop(model, record, gone)


def auxiliary_loss(model: nn.Module, mask: Tensor | None = None) -> Tensor | None:
    """The sum of what the adapters that train add to the loss; None if nothing. `mask` (B, T): True at real tokens."""
    penalties = [t.config.penalty(model, mask) for t in tunings_of(model).values() if t.trains]
    return sum(given) if (given := [penalty for penalty in penalties if penalty is not None]) else None


def taken(record: Record | None, name: str) -> list[str]:
    """Why a further adapter cannot have this name; empty if it can."""
    if not name or set(name) & set("@/. "):
        return [f"{name!r} cannot name an adapter: letters, digits, _ and -"]
    if record is None:
        return []
    if record.merged is not None:
        return ["it is merged for a time; unmerge(model) first"]
    if name not in record.tunings:
        return []
    return [
        f"it has an adapter {name!r}: {record.tunings[name].config}",
        'or give the new one a name of its own, to stand on top: tune(model, config, name="second")',
    ]


def _slots(model: nn.Module) -> dict[tuple[int, str], Slot]:
    """Every place of the base where a parameter stands, or could."""
    slots = {}
    for place in places(model):
        if not place.adapter:
            for leaf, parameter in place.module._parameters.items():
                name = f"{place.name}.{leaf}" if place.name else leaf
                slots.setdefault((id(place.module), leaf), Slot(name, place.module, leaf, parameter, parameter))
    return slots


def _own_copies(tuning: Tuning, stood: Mapping, stands: Mapping[tuple[int, str], Slot]) -> list[Slot]:
    """Give the adapter its own copy of what it trains in place; where install has put one already, that is it."""
    trained = {id(s.own): s.name for s in stands.values() if s.name in tuning.plan.parameters and s.own is not None}
    if not tuning.config.keeps_base:
        return [
            Slot(trained[id(s.own)], s.module, s.leaf, s.own, s.own) for s in stands.values() if id(s.own) in trained
        ]
    before = {id(slot.own) for slot in stood.values()}
    copies = {
        id(s.own): nn.Parameter(s.own.detach().clone()) if id(s.own) in before else s.own
        for s in stands.values()
        if id(s.own) in trained
    }
    own = []
    for key, slot in stands.items():
        if id(slot.own) in copies:
            was = stood[key].own if key in stood else None
            own.append(Slot(trained[id(slot.own)], slot.module, slot.leaf, copies[id(slot.own)], was))
            own[-1].put(own=True)
    return own


def _collect(model: nn.Module, tuning: Tuning, known: set[int]) -> None:
    """Note the wrappers and gates that are new in the model, and give them the adapter's name."""
    new = [(name, module) for name, module in added(model) if id(module) not in known]
    tuning.wrappers = [(name, module) for name, module in new if isinstance(module, Wrapper)]
    tuning.gates = [
        (name.removesuffix(module.leaf).rstrip("."), module) for name, module in new if isinstance(module, Gate)
    ]
    for _, module in new:
        module.adapter = tuning.name


def _drop(model: nn.Module, record: Record, names: Iterable[str]) -> None:
    for tuning in [record.tunings[name] for name in names]:
        tuning.active = False
    active = record.active
    arrange(model, record, active, [name for name in active if record.tunings[name].trains])
    for name in names:
        del record.tunings[name]
    if not record.tunings:
        forget(model)
