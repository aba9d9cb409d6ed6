"""Several adapters on one model: which of them are active, and which train."""

from collections.abc import Iterable

from torch import nn

from minillm.peft.merge import unmerge
from minillm.peft.method import refuse
from minillm.peft.names import collapse
from minillm.peft.record import Record, arrange, choose, forget, require_record


def activate(model: nn.Module, *names: str, train: Iterable[str] | None = None) -> None:
    """Let the model compute with these adapters, in the order of their adding, and without the others.

    None at all: the base. They train, or those of them that `train` names. Raises ValueError for unknown names, for two
    adapters with a parameter of the base in common, such as two heads, unless one was trained on top of the other, and
    for leaving out one that has changed the base for good (full tuning).
    """
    record = require_record(model, "activate")
    if not all(isinstance(name, str) for name in (*names, *(train or ()))):
        raise ValueError(f'activate(model, "a", "b", train=["a"]) takes names of adapters, not {names!r}, {train!r}')
    train = tuple(names if train is None else train)
    problems = [f"there is no adapter {name!r}" for name in (*names, *train) if name not in record.tunings]
    problems += [f"{name!r} is to train, but not to be active" for name in train if name not in names]
    problems += ["it is merged for a time; unmerge(model) first"] if record.merged is not None else []
    problems = problems or _together(record, names)
    known = ", ".join(map(repr, record.tunings))
    refuse(problems, f"these adapters cannot be activated; the model has {known}:")
    arrange(model, record, names, train)


def _together(record: Record, names: Iterable[str]) -> list[str]:
    """Why these adapters cannot be the active ones."""
    chosen = [tuning for name, tuning in record.tunings.items() if name in set(names)]
    problems = [
        f"{name!r} has trained the base's own weights, of which there is no other copy: it stays active"
        for name, tuning in record.tunings.items()
        if not tuning.config.keeps_base and tuning not in chosen
    ]
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            places = {(id(slot.module), slot.leaf) for slot in one.slots}
            shared = [slot.name for slot in other.slots if (id(slot.module), slot.leaf) in places]
            if shared and one.name not in other.under:
                what = ", ".join(collapse(shared))
                problems.append(f"{one.name!r} and {other.name!r} each have their own {what}: choose one of them")
    return problems


def unload(model: nn.Module, name: str | None = None) -> None:
    """Drop an adapter, or without a name all: modules, weights, requires_grad are bit for bit those from before `tune`.

    What QLoRA and QA-LoRA have quantized stays so. Adapters that trained before it came train again. Raises ValueError
    where the method trained weights of the base itself, which nobody kept (load the base again), and where another
    adapter was trained on top of this one.
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
        unmerge(model)
    for name in gone:
        record.tunings[name].active = False
    active = record.active
    again = {other for name in gone for other in record.tunings[name].stopped}
    arrange(model, record, active, [name for name in active if record.tunings[name].trains or name in again])
    for name in gone:
        del record.tunings[name]
    if not record.tunings:
        forget(model)
