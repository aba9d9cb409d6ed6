"""Adapters of models that the Hub has too, as folders that Hugging Face peft loads around the transformers model.

`peft.save_adapter` keeps our names of the base's modules; here the same folder has transformers' names, with fused
matrices as they are there. Its minillm.json says so, and lets ours come back exactly.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.config import from_dict, to_dict
from minillm.files import atomic_folder, read_json, sha256_file, write_json
from minillm.finetune.hub_layers import Adapter, paths_of
from minillm.finetune.hub_rules import unmatched
from minillm.finetune.hub_translation import KINDS, from_hub, to_hub
from minillm.models.families.module_names import HubNames, hub_names
from minillm.peft import METHODS, Report, load_adapter, save_adapter
from minillm.peft.io import FORMAT, OWN_CONFIG, PEFT_CONFIG, WEIGHTS
from minillm.peft.lora_bias import if_any, without_repeats
from minillm.peft.method import Method, Plan, refuse
from minillm.peft.names import DEFAULT, base_parameters
from minillm.peft.peft_fields import flaws
from minillm.peft.peft_tasks import REASON
from minillm.peft.record import choose, tunings_of

NAMES = "transformers"  # whose names the folder has, in minillm.json


def save_hf_adapter(model: nn.Module, folder: str | Path, name: str | None = None, *, base: str | None = None) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained(transformers' model, folder)` answers as `model` does.

    `name` says which adapter, where the model has several. `base` is where transformers finds the base model: a name on
    the Hub, or the folder that `save_hf` wrote. LoRAs on q, k and v become one where theirs are fused, of a rank that
    is the sum of theirs (the rank stays where they have the same A). Heads for which peft has a task are in the folder
    whether they were trained or not, since peft expects them there. A QLoRA answers the same only on weights that are
    rounded as it rounded them. Whole or not at all.
    Raises one ValueError listing all that transformers or peft has no counterpart for.
    """
    names = hub_names(model)
    tuning = choose(model, name, "save")
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(model, Path(temporary) / "adapter", tuning.name, base=base)
        adapter, own = _read(Path(temporary) / "adapter")
    if (kind := adapter.fields["peft_type"]) not in KINDS:
        why = adapter.fields.get(REASON) or kind
        raise ValueError(
            f"peft cannot read {tuning.config.title or tuning.config.name} as it is on this {type(model).__name__} "
            f"({why}): keep it with minillm.peft.save_adapter, or where it can be merged, merge(model) and "
            "save_hf(model); a prompt or prefix that a network makes "
            "becomes plain vectors by minillm.peft.flatten(model)"
        )
    problems = [f"it stands on the adapter {other!r}: merge that into the base first" for other in tuning.under]
    problems += _prefix_problems(model, names, kind)
    written = to_hub(names, adapter, _base_values(model), problems)
    refuse(problems, f"this adapter cannot be said in the names of transformers' {names.architecture.name}:")
    with atomic_folder(folder) as new:
        save_file(written.tensors, new / WEIGHTS, metadata={"format": "pt"})
        write_json(new / PEFT_CONFIG, written.fields)
        write_json(new / OWN_CONFIG, own | {"names": NAMES, "weights_sha256": sha256_file(new / WEIGHTS)})


def load_hf_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT, *, check_base: bool = True) -> Report:
    """Put an adapter of the transformers model, by peft or by `save_hf_adapter`, on our model of the same weights.

    As `peft.load_adapter`: strict in both directions, with one ValueError that lists everything and the model
    unchanged. `check_base` is about folders of ours only, since peft's do not say which weights they belong to.
    A LoRA on a fused matrix becomes one on each part, each with its own copy of A, and its part of B.
    """
    folder = Path(folder)
    adapter, own = _read(folder)
    _refuse_others(folder, adapter, own)
    names = hub_names(model)
    problems = _prefix_problems(model, names, adapter.fields["peft_type"])
    config, tensors = _translate(model, names, folder, adapter, own, problems)
    refuse(problems, f"the adapter in {folder} does not fit this {type(model).__name__}, which is unchanged:")
    with tempfile.TemporaryDirectory() as temporary:
        ours = Path(temporary)
        save_file(tensors, ours / WEIGHTS, metadata={"format": "pt"})
        described = {"format": FORMAT, "method": config.name, "config": to_dict(config), "names": "minillm"}
        write_json(ours / OWN_CONFIG, own | described | {"weights_sha256": sha256_file(ours / WEIGHTS)})
        try:
            return load_adapter(model, ours, name, check_base=check_base and bool(own))
        except ValueError as error:
            raise ValueError(str(error).replace(str(ours), str(folder))) from None


def _translate(
    model: nn.Module, names: HubNames, folder: Path, adapter: Adapter, own: Mapping[str, Any], problems: list[str]
) -> tuple[Method | None, dict[str, Tensor]]:
    """The config and the tensors by our names; what is wrong with them goes to `problems`."""
    values = _base_values(model)
    if own:
        config = from_dict(METHODS[own["method"]], own.get("config"), where=f"{folder / OWN_CONFIG}: config.")
        plan = config.plan(model)
        ours = Adapter(config.to_peft(plan), config.to_peft_tensors(plan, plan.parameters))
        tensors = from_hub(names, adapter, values, problems, ours)[0].tensors
        problems += _misfits(plan, config.from_peft_tensors(plan, tensors))
        return config, tensors
    config, tensors = None, adapter.tensors
    try:
        lacking = unmatched(adapter.fields, paths_of(names))
        problems += [f"target_modules: {names.architecture.name} has no module {target!r}" for target in lacking]
        translated, modules = from_hub(names, adapter, values, problems, None)
        tensors = translated.tensors
        config = _method(adapter.fields["peft_type"]).from_peft(translated.fields, model)
        config = if_any(dataclasses.replace(config, trainable=modules), model)
        plan = config.plan(model)
        problems += _misfits(plan, config.from_peft_tensors(plan, tensors))
    except ValueError as error:
        problems += str(error).splitlines()
    return config, tensors


def _method(peft_type: str) -> type[Method]:
    """The first of our methods that is peft's of that word."""
    return next(cls for cls in METHODS.values() if cls.peft_type == peft_type)


def _misfits(plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is missing, left over or of another shape, by our names."""
    shapes, found = ({key: tuple(t.shape) for key, t in named.items()} for named in (plan.parameters, tensors))
    wrong = [f"missing:    {key} {shape}" for key, shape in shapes.items() if key not in found]
    wrong += [f"unexpected: {key} {shape}" for key, shape in found.items() if key not in shapes]
    both = (key for key in shapes if key in found and shapes[key] != found[key])
    return wrong + [f"mis-shaped: {key}: the file has {found[key]}, the model {shapes[key]}" for key in both]


def _read(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, and minillm.json (empty where there is none)."""
    fields, own = read_json(folder / PEFT_CONFIG), {}
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / PEFT_CONFIG}: expected an object with a peft_type, got {type(fields).__name__}")
    if (folder / OWN_CONFIG).exists():
        own = read_json(folder / OWN_CONFIG)
        if not isinstance(own, dict) or own.get("format") != FORMAT or own.get("method") not in list(METHODS):
            raise ValueError(
                f"{folder / OWN_CONFIG} is of another minillm: this one reads format {FORMAT} and the methods "
                f"{', '.join(METHODS)}"
            )
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{path} is missing: save the adapter as safetensors, which peft does unless told otherwise")
    if own and sha256_file(path) != own.get("weights_sha256"):
        raise ValueError(f"{path} is damaged: its checksum is not the one in {OWN_CONFIG}; copy it again")
    try:
        return Adapter(fields, without_repeats(load_file(path))), own
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _refuse_others(folder: Path, adapter: Adapter, own: Mapping[str, Any]) -> None:
    if own and own.get("names") != NAMES:
        raise ValueError(f"{folder} has our names: load it with minillm.peft.load_adapter(model, folder)")
    if (kind := adapter.fields.get("peft_type")) not in KINDS:
        raise ValueError(f"{folder / PEFT_CONFIG} has peft_type {kind!r}; this minillm reads {', '.join(KINDS)}")
    refuse(flaws(adapter.fields), f"{folder / PEFT_CONFIG}:")


def _prefix_problems(model: nn.Module, names: HubNames, peft_type: str) -> list[str]:
    """Where transformers does something else with a prefix, which peft hands it as a cache."""
    if peft_type != "PREFIX_TUNING":
        return []
    problems = []
    if any(model.config.window(layer) for layer in range(model.config.num_layers)):
        problems.append(
            "sliding_window: transformers counts a prefix as text that slides out of the window; here it stays"
        )
    if names.family.name == "DistilBERT":
        problems.append("transformers' DistilBERT does not read a prefix: its attention has no cache")
    return problems


def _base_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by name, as they are without any adapter."""
    values = {name: parameter.detach() for name, parameter in base_parameters(model)}
    for tuning in reversed(tunings_of(model).values()):
        for slot in tuning.slots if tuning.active else ():
            if slot.before is None:
                values.pop(slot.name, None)
            else:
                values[slot.name] = slot.before.detach()
    return values
