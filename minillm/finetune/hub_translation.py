"""A whole adapter in peft's layout: from our names of the base's modules to those of transformers, and back.

Beside the adapter's layers (`hub_layers`) the file holds parameters of the base that were trained: heads and biases.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from minillm.finetune.hub_layers import (
    LEAVES,
    Adapter,
    factors_from_hub,
    factors_to_hub,
    lora_from_hub,
    lora_to_hub,
    same,
)
from minillm.finetune.hub_rules import HEADS, taken, trains
from minillm.models.families.family import LM
from minillm.models.families.keys import Entry
from minillm.models.families.module_names import HubNames, split
from minillm.peft.method import PREFIX
from minillm.peft.names import collapse, inside

LAYERS = {"LORA": (lora_to_hub, lora_from_hub), "IA3": (factors_to_hub, factors_from_hub)}
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")  # vectors of no layer, under one key
KINDS = (*LAYERS, *PROMPTS)
PROMPT_KEY = "prompt_embeddings"
EMBEDDED = ".base_layer.weight"  # peft puts the base's embedding into the file when it is a target
DROPPED = (  # fields of theirs that have become targets and modules of ours
    *("fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
TASKS = {  # of our heads and bodies -> peft's; masked language models and choices have none there
    "classification": "SEQ_CLS",
    "multi_label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
    "body": "FEATURE_EXTRACTION",
    "masked_lm": None,
    "choice": None,
}


def to_hub(names: HubNames, adapter: Adapter, values: Mapping[str, Tensor], problems: list[str]) -> Adapter:
    """The same adapter in transformers' names. `values` are the base's parameters, by our names.

    A head that peft saves with every adapter for its task is written as it stands also where it was not trained.
    """
    fields, prompts = adapter.fields, adapter.fields["peft_type"] in PROMPTS
    layers, trained, prompt = _sort(adapter)
    known = {parameter for entry in names.entries for parameter in entry.parameters}
    lacking = [name for name in layers if name not in names.modules] + [name for name in trained if name not in known]
    if lacking:
        problems.append(f"a {names.architecture.name} has nothing like {', '.join(collapse(lacking))}")
        return adapter
    out = Adapter({}, {}) if prompts else LAYERS[fields["peft_type"]][0](names, fields, layers, problems)
    adapted = [path for name in layers for path in names.modules[name].paths]
    task = fields["task_type"] if prompts else _task(names)
    if any(taken(path, HEADS.get(task, ())) for path in adapted):
        task = None  # for a task peft trains the head in full, and so would take no adapter inside it
    saved, entries = _to_save(names, fields, trained, HEADS.get(task, ()))
    if gone := sorted({p for entry in entries.values() for p in entry.parameters} - values.keys() - trained.keys()):
        problems.append(f"{', '.join(collapse(gone))}: quantized, and peft wants it in full")
        return adapter
    whole = {
        _prefix(fields) + _below(key, adapted): entry.join({**values, **trained}).detach().cpu().clone()
        for key, entry in entries.items()
    }
    said = {"task_type": task, "modules_to_save": saved or None}
    said |= {} if prompts else {"fan_in_fan_out": any(names.modules[name].transposed for name in layers)}
    return Adapter({**fields, **out.fields, **said}, out.tensors | whole | prompt)


def from_hub(
    names: HubNames, adapter: Adapter, values: Mapping[str, Tensor], problems: list[str], ours: Adapter | None
) -> tuple[Adapter, tuple[str, ...]]:
    """The same adapter in our names, and the modules of ours that it trains in full.

    `ours` is what the adapter was written from, where that is known: its fields, and its tensors' shapes.
    """
    fields, before = adapter.fields, _prefix(adapter.fields)
    layers, rest, prompt = _sort(adapter)
    prompts = fields["peft_type"] in PROMPTS
    out = Adapter({}, {}) if prompts else LAYERS[fields["peft_type"]][1](names, fields, layers, problems, ours)
    whole = _whole(names, rest, values, problems)
    if ours is None:
        saved = (*(fields.get("modules_to_save") or ()), *HEADS.get(fields.get("task_type"), ()))
        entries = [names.state[key] for key in rest if key in names.state and taken(_module(key), saved)]
        keys = {name: before + name for entry in entries for name in entry.parameters}
        modules = tuple(dict.fromkeys(_module(name) for name in whole if name in keys))
        adapted = _sort(adapter._replace(tensors=out.tensors))[0]
        biases = [name for name in whole if name not in keys and trains(fields, name, adapted)]
        keys |= {name: before + name for name in biases}
        why = "the file has other values than the base, yet neither `bias` nor `modules_to_save` lets it train"
    else:  # beside it may be a head that did not train
        modules = ()
        keys = {_above(key.removeprefix(before)): key for key in ours.tensors}
        why = "the file has other values than the base, yet it did not train"
    if changed := [name for name in whole if name not in keys and not same(whole[name], values[name])]:
        problems.append(f"{', '.join(collapse(changed))}: {why}")
    whole = {name: tensor for name, tensor in whole.items() if name in keys}
    tensors = out.tensors | {keys[name]: tensor for name, tensor in whole.items()} | prompt
    said = {name: value for name, value in fields.items() if name not in DROPPED}
    return Adapter(said | out.fields, tensors), modules


def _sort(adapter: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """What adapters brought, by module and leaf; the base's parameters by name; and a prompt by its key."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest, prompt = {}, {}
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(_prefix(adapter.fields))
        leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
        if key == PROMPT_KEY and adapter.fields["peft_type"] in PROMPTS:
            prompt[key] = tensor
        elif leaf is not None and adapter.fields["peft_type"] in LAYERS:
            layers.setdefault(name.removesuffix(f".{leaf}"), {})[leaf] = tensor
        else:
            rest[name if name.endswith(EMBEDDED) else _above(name)] = tensor
    return layers, rest, prompt


def _to_save(
    names: HubNames, fields: Mapping[str, Any], trained: Collection[str], heads: tuple[str, ...]
) -> tuple[list[str], dict[str, Entry]]:
    """`modules_to_save`, and the entries of the file by key: those modules' parameters, and biases trained alone.

    What peft takes for the task anyway is not listed a second time: one wrapper inside another would not load.
    """
    modules = fields.get("modules_to_save") or ()
    biases = set() if fields.get("bias", "none") == "none" else {name for name in trained if not inside(name, modules)}
    full = [entry for entry in names.entries if set(entry.parameters) & (set(trained) - biases)]
    paths = dict.fromkeys(_module(key) for entry in full for key in names.keys(entry))
    saved = [*(path for path in paths if not taken(path, heads)), *heads]
    entries = {key: entry for key, entry in names.state.items() if taken(_module(key), saved)}
    alone = {key: e for e in names.entries if biases & set(e.parameters) for key in names.keys(e)}
    return saved, alone | entries


def _whole(
    names: HubNames, rest: Mapping[str, Tensor], values: Mapping[str, Tensor], problems: list[str]
) -> dict[str, Tensor]:
    """Parameters of the base by our names."""
    whole, read = {}, {}
    for name, tensor in rest.items():
        entry = names.state.get(_above(name))
        if entry is None:
            problems.append(f"unexpected: {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != entry.shape:
            problems.append(f"mis-shaped: {name}: the file has {tuple(tensor.shape)}, the model {entry.shape}")
        elif name.endswith(EMBEDDED):
            if not same(tensor, entry.join(values)):
                problems.append(f"different:  {name}: it was trained on a base with other values (new tokens?)")
        elif entry.key in read and not same(tensor, read[entry.key]):
            problems.append(f"different:  {name}: one parameter here, and the file has two values for it")
        else:
            read[entry.key] = tensor
            whole |= split(entry, tensor)
    return {name: tensor.contiguous() for name, tensor in whole.items()}


def _task(names: HubNames) -> str | None:
    """peft's word for what the model is for; None where it has none."""
    task, types = names.architecture.task, names.modules.get("body.embed_types")
    if task == LM:
        return "SEQ_2_SEQ_LM" if names.family.fixed["kind"] == "encoder_decoder" else "CAUSAL_LM"
    if task == "span" and types is not None and types.stop > 1:
        return None  # peft's class for this task drops token_type_ids, without a word; its general class does not
    return TASKS[task]


def _prefix(fields: Mapping[str, Any]) -> str:
    """What peft puts before the names of the base's modules."""
    return "base_model." if fields["peft_type"] in PROMPTS else PREFIX


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _above(name: str) -> str:
    """A parameter's name without the segment that peft puts in for a layer it adapts."""
    return name.replace(".base_layer.", ".")


def _below(key: str, adapted: Collection[str]) -> str:
    return f"{_module(key)}.base_layer.{key.rpartition('.')[2]}" if _module(key) in adapted else key
