"""`tune` puts an adapter on a model and lets exactly that train."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from minillm.peft.doors import gates, reopen
from minillm.peft.fingerprint import fingerprint
from minillm.peft.linears import coded_values
from minillm.peft.method import Method, refuse
from minillm.peft.names import (
    DEFAULT,
    Gate,
    Wrapper,
    base_modules,
    collapse,
    every_parameter,
    original_modules,
    original_parameters,
)
from minillm.peft.record import (
    Record,
    Tuning,
    added,
    arrange,
    choose,
    record_of,
    require_record,
    set_training,
    tunings_of,
)
from minillm.peft.slots import own_copies, slots_of


@dataclasses.dataclass(frozen=True)
class Report:
    """What `tune` did: the modules it touched (original paths; of biases alone, theirs) and how many values train."""

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
    if not isinstance(model, nn.Module) or not isinstance(config, Method):
        raise ValueError(f"tune(model, config) takes a model and a config such as LoraConfig(), not {config!r}")
    record = record_of(model)
    if problem := bad_name(name):
        raise ValueError(problem)
    refuse(taken(record, name), "this model is tuned already; merge(model) or unload(model) it first:")
    refuse(_conflicts(model, record, config), f"this {type(model).__name__} cannot be tuned so, and is unchanged:")
    plan = config.plan(model)
    if record is None:
        record = Record({name: parameter.requires_grad for name, parameter in every_parameter(model)})
    tuning = Tuning(name, config, plan, record.active)
    tuning.stopped = tuple(other for other, t in record.tunings.items() if t.trains)
    if config.changes_base:
        tuning.fingerprint = fingerprint(model, tuning)
    _warn_of_statistics(model)
    known, stood = {id(module) for _, module in added(model)}, slots_of(model)
    with _undone_on_error(model, record, tuning):
        config.install(model, plan)
        _collect(model, tuning, known)
        tuning.slots = own_copies(config, plan, stood, slots_of(model))
        for other in tuning.stopped:
            record.tunings[other].trains = False
        set_training(model, record)
        trainable = sum(parameter.numel() for parameter in tuning.parameters().values())
        assert trainable == plan.count, f"{trainable} values train, the formula says {plan.count}"
        total = sum(p.numel() for p in original_parameters(model).values()) + coded_values(model)
    return Report(config.name, plan.touched, trainable, total)


def _warn_of_statistics(model: nn.Module) -> None:
    """Running statistics move whenever a model computes in training mode, also where all parameters are frozen."""
    tracking = [name for name, _, module in base_modules(model) if getattr(module, "track_running_stats", False)]
    if tracking:
        warnings.warn(
            f"{', '.join(collapse(tracking))}: running statistics of the base, which training moves and no file of an "
            "adapter holds, so that it would fit no other copy: keep them in eval mode, after each model.train() too",
            stacklevel=3,
        )


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, record: Record, tuning: Tuning) -> Iterator[None]:
    """Keep `tuning` on the record, or after an error leave the model as it was, every module and flag."""
    modules = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained = {other: t.trains for other, t in record.tunings.items()}
    model._tuned, record.tunings[tuning.name] = record, tuning
    try:
        yield
    except BaseException:
        gated = [module for module, children, _ in modules if len(gates(module)) > _number_of_gates(children)]
        for module, children, parameters in modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for module in gated:
            reopen(module)
        del record.tunings[tuning.name]
        for other, trains in trained.items():
            record.tunings[other].trains = trains
        for parameter, required in flags:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        if not record.tunings:
            del model._tuned
        raise


def _number_of_gates(children: Mapping[str, nn.Module | None]) -> int:
    return sum(isinstance(child, Gate) for child in children.values())


def _conflicts(model: nn.Module, record: Record | None, config: Method) -> list[str]:
    """What keeps any adapter of this kind from being added, whatever its settings."""
    inner = [name for name, _, module in original_modules(model) if module is not model and record_of(module)]
    problems = [f"{name} is tuned by itself; unload(model.{name}) it first" for name in inner]
    resting = [name for name, tuning in (record.tunings if record else {}).items() if not tuning.active]
    if resting and not config.keeps_base:
        named = ", ".join(map(repr, resting))
        problems.append(f"{config.name} tuning would change the base under {named}, not active now: unload them first")
    return problems


@torch.no_grad()
def flatten(model: nn.Module, name: str | None = None) -> None:
    """Put what an adapter's network computes in the network's place: fewer values, the same outputs.

    P-tuning and prefixes with a projection train through such a network; without it Hugging Face peft can read them.
    Training can go on, with a new optimizer. `name` says which adapter, where the model has several. Raises ValueError
    where there is no network.
    """
    tuning, record = choose(model, name, "flatten"), require_record(model, "flatten")
    train = [other for other, t in record.tunings.items() if t.trains]
    tuning.config.flatten(model, tuning)
    arrange(model, record, record.active, train)


def auxiliary_loss(model: nn.Module, mask: Tensor | None = None) -> Tensor | None:
    """The sum of what the adapters that train add to the loss; None if nothing. `mask` (B, T): True at real tokens.

    The Trainer adds it by itself; a loop of your own calls it once after each forward pass, whose choices of experts it
    takes and forgets.
    """
    penalties = [t.config.penalty(t, mask) for t in tunings_of(model).values() if t.trains]
    return sum(given) if (given := [penalty for penalty in penalties if penalty is not None]) else None


def bad_name(name: object) -> str | None:
    """Why this cannot name an adapter, None if it can."""
    fine = isinstance(name, str) and name and not set(name) & set("@/. ")
    return None if fine else f"{name!r} cannot name an adapter: a text of letters, digits, _ and -"


def taken(record: Record | None, name: str) -> list[str]:
    """Why a further adapter cannot have this name; empty if it can."""
    if problem := bad_name(name):
        return [problem]
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


def _collect(model: nn.Module, tuning: Tuning, known: set[int]) -> None:
    """Note the wrappers and gates that are new in the model, and give them the adapter's name."""
    new = [(name, module) for name, module in added(model) if id(module) not in known]
    tuning.wrappers = [(name, module) for name, module in new if isinstance(module, Wrapper)]
    tuning.gates = [
        (name.removesuffix(module.leaf).rstrip("."), module) for name, module in new if isinstance(module, Gate)
    ]
    for _, module in new:
        module.adapter = tuning.name
