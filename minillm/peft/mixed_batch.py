"""Mixed batches: inside `rows`, every row of a batch has an adapter of its own."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from minillm.config import nearest
from minillm.peft.bank import LoRABank, lora_layers
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.method import refuse
from minillm.peft.names import base_parameters, collapse, places
from minillm.peft.record import Record, arrange, follow, record_of, require_record, set_training
from minillm.peft.replace import replace_modules, wrap_modules


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None], *, repeats: int = 1) -> Iterator[None]:
    """Inside the block, row i of every batch goes through the LoRA adapter `names[i]`, or through the base (None).

    Each row gets what it would get alone after `activate(model, names[i])`. The adapters may differ in targets, ranks
    and scales; those named train, each from its own rows, and all else rests, other methods' adapters too. Afterwards
    the model is what it was, also after an error.
    `repeats`: a name may stand for up to so many rows one after the other, as beams (`num_beams`) and choices do.

    Everything that computes belongs inside: the loop over `generate(...)`, and the backward pass, which is refused
    outside (with gradient checkpointing, by torch: CheckpointError, since the layers that it runs again are others).
    Without gradients each row's matrices are copied once, so time does not depend on how many adapters there are, and
    memory is rows times R (Din + Dout) in each adapted layer.

    Raises ValueError listing unknown names and adapters that are not LoRA, and for a batch of another size; the model
    is unchanged. Source: Sheng et al. 2023 (S-LoRA, arXiv:2311.03285), section 5.

    Example: `with rows(model, ["poems", None, "code"]): tokens = generate_tokens(model, prompts, max_new_tokens=20)`
    """
    record, layers = _plan(model, names, repeats)
    active, known = record.active, list(record.tunings)
    trains = {name: tuning.trains for name, tuning in record.tunings.items()}
    states = [(parameter, parameter.requires_grad) for parameter in _parameters(model, record)]
    try:
        if active:
            arrange(model, record, (), ())
        for name in set(names) - {None}:
            follow(model, record.tunings[name])
        for name, tuning in record.tunings.items():
            tuning.trains = name in names
        set_training(model, record)
        wrap_modules(model, layers, lambda name, module: LoRABank(module, layers[name], names, repeats))
        yield
        if record.active or list(record.tunings) != known:
            raise ValueError(
                "adapters were added, switched or dropped inside rows(): do that before or after the block"
            )
    finally:
        if record.active:
            arrange(model, record, (), ())
        replace_modules(model, lambda _, module: isinstance(module, LoRABank), lambda _, module: module.base)
        if active:
            arrange(model, record, [name for name in active if name in record.tunings], ())
        for name, tuning in record.tunings.items():
            tuning.trains = trains.get(name, False)
        for parameter, required in states if record_of(model) is record else ():
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _plan(model: nn.Module, names: Sequence[str | None], repeats: int) -> tuple[Record, dict[str, dict]]:
    """The record, and original path -> name of adapter -> its layer there; or one ValueError."""
    record = require_record(model, "mix")
    problems = _wrong(names, repeats)
    if record.merged is not None:
        problems.append("it is merged for a time; unmerge(model) first")
    if any(isinstance(place.module, LoRABank) for place in places(model)):
        problems.append("it is inside another rows() already: leave that block first")
    layers: dict[str, dict] = {}
    if not problems:
        used = dict.fromkeys(name for name in names if name is not None)
        for name in used:
            if name not in record.tunings:
                problems.append(f"there is no adapter {name!r}; did you mean {nearest(name, record.tunings)}?")
        layers = lora_layers(record.tunings, [name for name in used if name in record.tunings], problems)
        for name in used:
            other = [at for at, found in layers.items() if name in found and type(found[name]) is not LoRALinear]
            problems += [f"{name!r} adapts more than linear layers: {', '.join(collapse(other))}"] if other else []
    refuse(problems, f"rows() cannot mix adapters in this {type(model).__name__}, which is unchanged:")
    return record, layers


def _wrong(names: Sequence[str | None], repeats: int) -> list[str]:
    problems = []
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name is None or isinstance(name, str) for name in names):
        problems.append(f"names: the name of an adapter or None for each row, such as ['a', None, 'b'], not {names!r}")
    elif not len(names):
        problems.append("names: there is no row; name an adapter or None for each")
    if type(repeats) is not int or repeats < 1:
        problems.append(f"repeats: a whole number, at least 1, not {repeats!r}")
    return problems


def _parameters(model: nn.Module, record: Record) -> Iterator[nn.Parameter]:
    yield from (parameter for _, parameter in base_parameters(model))
    for tuning in record.tunings.values():
        yield from tuning.parameters().values()
        yield from (slot.before for slot in tuning.slots if slot.before is not None)
