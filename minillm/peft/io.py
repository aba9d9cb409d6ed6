"""Adapters as folders: what trains is what is saved, strictly checked on the way back.

The layout is Hugging Face peft's (adapter_config.json, adapter_model.safetensors), so each reads the other's LoRA;
`minillm.json` adds what peft does not record: the base that the adapter belongs to, the tokenizer, a checksum, and the
config in our own words, which is the one we read where it is there.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.config import from_dict, to_dict
from minillm.files import atomic_folder, read_json, sha256_file, write_json
from minillm.peft.fingerprint import fingerprint
from minillm.peft.method import Method, Plan, refuse
from minillm.peft.methods import METHODS
from minillm.peft.names import DEFAULT, original_parameters
from minillm.peft.peft_fields import flaws
from minillm.peft.record import Tuning, choose, record_of, tunings_of
from minillm.peft.switch import activate
from minillm.peft.tune import Report, taken, tune

FORMAT = 1  # raised when an older minillm could not read what a newer one writes
WEIGHTS, PEFT_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "minillm.json"


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    base: str | None = None,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write what an adapter trains to `folder`, whole or not at all; an older one there is replaced.

    `name` says which adapter, where the model has several. `base` says for people, and for peft, where the base model
    is to be found. `beside` are further JSON files to lie in the folder, by name. Raises ValueError when the model is
    not tuned, is merged, or has had parameters frozen or unfrozen by hand, which loading could not repeat.
    """
    tuning = choose(model, name, "save")
    refuse(_unsaveable(model, tuning), "this model cannot be saved as an adapter:")
    config, tensors = tuning.config.saved_as(tuning)
    plan = dataclasses.replace(tuning.plan, parameters=tensors)
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(config.to_peft_tensors(plan, tensors), temporary / WEIGHTS, metadata={"format": "pt"})
        described = {"peft_type": config.peft_type, "base_model_name_or_path": base, "task_type": None}
        write_json(temporary / PEFT_CONFIG, described | {"inference_mode": True} | config.to_peft(plan))
        own = {
            "format": FORMAT,
            "method": config.name,
            "config": to_dict(config),
            "base_fingerprint": fingerprint(model, tuning),
            "under": list(tuning.under),
            "tokenizer_fingerprint": _tokenizer(model),
            "weights_sha256": sha256_file(temporary / WEIGHTS),
        }
        for file, content in {OWN_CONFIG: own, **beside}.items():
            write_json(temporary / file, content)


def load_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT, *, check_base: bool = True) -> Report:
    """Put the adapter in `folder` on `model` and copy the saved values in; it trains from then on.

    Where the model has adapters already, the new one stands on those that are active if it was trained so, and
    otherwise alone: they are still there and not active.
    Raises one ValueError listing all that is wrong, with the model unchanged: a damaged file, another format, another
    base or tokenizer, targets that do not exist, missing, unexpected or mis-shaped tensors. `check_base=False` accepts
    another base of the same shapes, such as a bfloat16 copy. A folder written by peft names no base to compare with.
    """
    folder = Path(folder)
    config, own = _config(model, folder)
    before = record_of(model)
    problems = taken(before, name)
    plan = None if problems else _plan(model, config, problems)
    damage: list[str] = []
    tensors = _read(folder / WEIGHTS, own.get("weights_sha256", "none") if own else None, damage)
    refuse(damage, f"the adapter in {folder} is damaged, so nothing was loaded:")
    under: tuple[str, ...] = ()
    if plan is not None:
        tensors = config.from_peft_tensors(plan, tensors)
        under, fits = _stand(model, config, plan, own.get("base_fingerprint"))
        below = own.get("under") or []
        if own and not fits and below and (lacking := [name for name in below if name not in tunings_of(model)]):
            problems.append(
                f"it was trained on top of the adapter(s) {', '.join(map(repr, lacking))}: load those first, by these "
                "names, and activate them"
            )
        elif own and not fits and check_base:
            problems.append(
                "it was trained on a base with other weights: give that one (in Python, check_base=False uses this)"
            )
        elif not fits and below:
            under = tuple(below)
        problems += _misfits(plan, tensors)
    if own.get("tokenizer_fingerprint") and _tokenizer(model) not in (None, own["tokenizer_fingerprint"]):
        problems.append("it was trained with another tokenizer than this model's")
    refuse(problems, f"the adapter in {folder} does not fit this {type(model).__name__}, which is unchanged:")
    trained = [other for other, tuning in tunings_of(model).items() if tuning.trains]
    active = before.active if before else ()
    if before is not None:
        activate(model, *under)
    try:
        report = tune(model, config, name)
    except BaseException:
        if before is not None:
            activate(model, *active, train=trained)
        raise
    with torch.no_grad():
        for key, parameter in tunings_of(model)[name].parameters().items():
            parameter.copy_(tensors[key])
    return report


def _stand(model: nn.Module, config: Method, plan: Plan, saved: str | None) -> tuple[tuple[str, ...], bool]:
    """The adapters that the new one was trained on top of, and whether its base is this model's."""
    record = record_of(model)
    active = record.active if record else ()
    for under in dict.fromkeys((active, ())):
        if saved is None or fingerprint(model, Tuning("", config, plan, under)) == saved:
            return (config.stands_on if saved is None else under), saved is not None
    return config.stands_on, False


def _unsaveable(model: nn.Module, tuning: Tuning) -> list[str]:
    if record_of(model).merged is not None:
        return ["it is merged for a time; unmerge(model) first"]
    known = {id(p) for t in tunings_of(model).values() for p in t.parameters().values()}
    problems = [
        f"{name} trains, but not by the config"
        for name, p in original_parameters(model).items()
        if p.requires_grad and id(p) not in known
    ]
    own = tuning.parameters().items() if tuning.trains else ()
    return problems + [f"{name} should train, but is frozen" for name, p in own if not p.requires_grad]


def _config(model: nn.Module, folder: Path) -> tuple[Method, dict[str, Any]]:
    """The config, and what else minillm.json says (nothing, in a folder that peft wrote)."""
    if not (folder / OWN_CONFIG).exists():
        path, types = folder / PEFT_CONFIG, {cls.peft_type: cls for cls in reversed(list(METHODS.values()))}
        fields = read_json(path)
        cls = _choose(path, types, fields, "peft_type")
        refuse(flaws(fields), f"{path}:")
        try:
            return cls.from_peft(fields, model), {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    path = folder / OWN_CONFIG
    own = read_json(path)
    _choose(path, {FORMAT: None}, own, "format")
    if own.get("names") == "transformers":
        raise ValueError(f"{folder} has the names of a transformers model: load it by minillm.load_hf_adapter")
    return from_dict(_choose(path, METHODS, own, "method"), own.get("config"), where=f"{path}: config."), own


def _choose(path: Path, known: Mapping[Any, Any], fields: Any, key: str) -> Any:
    """known[fields[key]], or an error saying what this minillm reads."""
    value = fields.get(key) if isinstance(fields, dict) else fields
    if not isinstance(value, str | int) or value not in known:
        raise ValueError(f"{path} has {key} {value!r}; this minillm reads {', '.join(map(str, known))}")
    return known[value]


def _plan(model: nn.Module, config: Method, problems: list[str]) -> Plan | None:
    try:
        return config.plan(model)
    except ValueError as error:
        problems.extend(str(error).splitlines())
        return None


def _read(path: Path, checksum: str | None, problems: list[str]) -> dict[str, Tensor] | None:
    """The tensors of the file by key, None if it is not whole; peft's folders have no checksum."""
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        problems.append(f"{path.name} is damaged: {error}")
        return None
    if checksum is not None and sha256_file(path) != checksum:
        problems.append(f"{path.name} is damaged: its checksum is not the one in {OWN_CONFIG}; copy it again")
        return None
    return tensors


def _misfits(plan: Plan, tensors: dict[str, Tensor]) -> list[str]:
    wanted = plan.parameters
    bad = [f"missing:    {name} {tuple(wanted[name].shape)}" for name in wanted if name not in tensors]
    bad += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in tensors if name not in wanted]
    for name in wanted:
        if name not in tensors:
            continue
        saved, here = tensors[name], wanted[name]
        if saved.shape != here.shape:
            bad.append(f"mis-shaped: {name}: the file has {tuple(saved.shape)}, the model {tuple(here.shape)}")
        elif torch.promote_types(saved.dtype, here.dtype) != here.dtype:
            bad.append(f"mis-typed:  {name}: {saved.dtype} in the file would be rounded to {here.dtype}")
    return bad


def _tokenizer(model: nn.Module) -> str | None:
    return getattr(model, "tokenizer_fingerprint", None)  # models of other libraries have none
