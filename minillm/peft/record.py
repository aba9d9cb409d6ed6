"""What a tuned model remembers: its adapters, what each of them put where, and what stood there before.

An adapter that is not active is out of the model altogether and kept here, so the model then *is* its base, and an
inactive adapter costs nothing.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from minillm.peft.doors import enter, leave
from minillm.peft.linears import adapter_dtype, device_of
from minillm.peft.method import Method, Plan
from minillm.peft.names import Gate, Wrapper, base_modules, every_parameter, join, places
from minillm.peft.replace import replace_modules, wrap_modules
from minillm.peft.slots import Slot, move

# a wrapper that was merged, the module that took its place, and that module's tensors from before
Folded = tuple[Wrapper, nn.Module, dict[str, Tensor]]


@dataclasses.dataclass
class Tuning:
    """One adapter on a model."""

    name: str
    config: Method
    plan: Plan
    under: tuple[str, ...]  # the adapters that were active when it was added: it was made for what they compute
    wrappers: list[tuple[str, Wrapper]] = dataclasses.field(default_factory=list)
    gates: list[tuple[str, Gate]] = dataclasses.field(default_factory=list)  # name of the module they stand before
    slots: list[Slot] = dataclasses.field(default_factory=list)
    active: bool = True
    trains: bool = True
    stopped: tuple[str, ...] = ()  # the adapters that trained until this one was added, and will again without it
    fingerprint: str | None = None  # of the base, where the method changed it

    @property
    def layers(self) -> dict[str, Wrapper]:
        """Its wrappers once each, under the first name of the layer that they stand around."""
        first = {id(wrapper): name for name, wrapper in reversed(self.wrappers)}
        return {name: wrapper for name, wrapper in self.wrappers if first[id(wrapper)] == name}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What it trains, by the names of its plan."""
        named: dict[str, nn.Parameter] = {}
        gates = [(join(name, gate.leaf), gate) for name, gate in self.gates]
        for name, module in (*self.wrappers, *gates):
            for leaf, parameter in module.named_parameters():
                if not (isinstance(module, Wrapper) and leaf.startswith("base.")):
                    named.setdefault(join(name, leaf), parameter)
        named |= {slot.name: slot.own for slot in self.slots}
        return {name: named[name] for name in self.plan.parameters if name in named}


@dataclasses.dataclass
class Record:
    """All adapters of a model, in the order of their adding, and what trained before the first of them."""

    required_grad: dict[str, bool]
    tunings: dict[str, Tuning] = dataclasses.field(default_factory=dict)
    merged: list[Folded] | None = None  # while merged for a time

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(name for name, tuning in self.tunings.items() if tuning.active)


def record_of(model: nn.Module) -> Record | None:
    """What `tune` left on the model, None where it is not tuned."""
    return vars(model).get("_tuned")


def tunings_of(model: nn.Module) -> dict[str, Tuning]:
    """The adapters on the model by name, in the order of their adding; empty where it is not tuned."""
    return record.tunings if (record := record_of(model)) else {}


def require_record(model: nn.Module, act: str) -> Record:
    """The record, or a ValueError saying that there is nothing to `act` on."""
    if (record := record_of(model)) is None:
        raise ValueError(f"nothing to {act}: this {type(model).__name__} is not tuned (tune() or load_adapter() first)")
    return record


def choose(model: nn.Module, name: str | None, act: str) -> Tuning:
    """The adapter of that name; without a name the only one."""
    tunings = require_record(model, act).tunings
    if name is None and len(tunings) == 1:
        return next(iter(tunings.values()))
    if name not in tunings:
        asked = f"there is no adapter {name!r} to {act}" if name is not None else f"which adapter to {act}?"
        raise ValueError(f"{asked.removesuffix('?')}: the model has {', '.join(map(repr, tunings))}")
    return tunings[name]


def arrange(model: nn.Module, record: Record, active: Iterable[str], train: Iterable[str]) -> None:
    """Take every adapter out, and put the `active` ones in again, in the order of their adding."""
    active, train = set(active), set(train)
    _take_all_out(model, record)
    for name, tuning in record.tunings.items():
        tuning.active, tuning.trains = name in active, name in active and name in train
        if tuning.active:
            _put_in(model, tuning)
    set_training(model, record)


def set_training(model: nn.Module, record: Record) -> None:
    """Let exactly the parameters of the adapters that train require a gradient. This is done nowhere else."""
    for _, parameter in every_parameter(model):
        _require(parameter, False)
    for tuning in record.tunings.values():
        for slot in tuning.slots:
            if slot.before is not None:
                _require(slot.before, False)
    for trains in (False, True):  # a parameter that one adapter trains and another has beneath it trains
        for tuning in record.tunings.values():
            if tuning.trains is trains:
                for parameter in tuning.parameters().values():
                    _require(parameter, trains)


def forget(model: nn.Module) -> None:
    """Make the model an untuned one: no record, and each parameter that the base had trains as it did before."""
    record = require_record(model, "forget")
    for name, parameter in every_parameter(model):
        _require(parameter, record.required_grad.get(name, parameter.requires_grad))
    del model._tuned


def added(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(original path, module) of every wrapper and gate in the model."""
    return ((p.name, p.module) for p in places(model) if isinstance(p.module, Wrapper | Gate))


def _take_all_out(model: nn.Module, record: Record) -> None:
    for module in [place.module for place in places(model)]:
        leave(module)
    own = {id(wrapper) for tuning in record.tunings.values() for _, wrapper in tuning.wrappers}
    while replace_modules(model, lambda _, module: id(module) in own, lambda _, module: module.base):
        pass  # one wrapper less around each module
    for tuning in reversed(record.tunings.values()):
        for slot in tuning.slots:
            slot.put(own=False)


def _put_in(model: nn.Module, tuning: Tuning) -> None:
    follow(model, tuning)
    wrappers = dict(tuning.wrappers)

    def wrap(name: str, module: nn.Module) -> Wrapper:
        wrappers[name].base = module
        return wrappers[name]

    wrap_modules(model, wrappers.keys(), wrap)
    for name, gate in tuning.gates:
        enter(model, name, gate)
    for slot in tuning.slots:
        slot.put(own=True)


def follow(model: nn.Module, tuning: Tuning) -> None:
    """Bring an adapter that is out of the model to where the layers that it adapts are by now."""
    layers = {name: own for name, _, own in base_modules(model)}
    for name, module in (*tuning.wrappers, *tuning.gates):
        if not any(True for _ in layers[name].parameters()):
            continue
        device, dtype = device_of(layers[name]), adapter_dtype(layers[name])
        for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not (isinstance(module, Wrapper) and leaf.startswith("base.")):
                parameter = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                move(tensor, device, dtype if parameter else tensor.dtype)


def _require(parameter: nn.Parameter, requires: bool) -> None:
    if parameter.requires_grad != requires:  # torch refuses to set even False on whole numbers
        parameter.requires_grad_(requires)
