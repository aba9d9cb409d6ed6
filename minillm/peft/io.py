"""Adapters as folders: what trains is what is saved, strictly checked on the way back.

The layout is Hugging Face peft's (adapter_config.json, adapter_model.safetensors), so each reads the other's LoRA;
`minillm.json` adds what peft does not record: the base that the adapter belongs to, the tokenizer, a checksum, and the
config in our own words, which is the one we read where it is there.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.config import from_dict, to_dict
from minillm.files import atomic_folder, read_json, sha256_file, write_json
from minillm.peft.method import Method, Plan, refuse, require_tuning, tuning_of
from minillm.peft.names import join, original_modules, original_parameters
from minillm.peft.tune import METHODS, Report, tune

FORMAT = 1  # raised when an older minillm could not read what a newer one writes
PREFIX = "base_model.model."  # peft puts it before every name
WEIGHTS, PEFT_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "minillm.json"


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None) -> None:
    """Write what trains in a tuned model to `folder`, whole or not at all; an older adapter there is replaced.

    `base` says for people, and for peft, where the base model is to be found. Raises ValueError when the model is not
    tuned, is merged, or has had parameters frozen or unfrozen by hand, which loading could not repeat.
    """
    tuning = require_tuning(model, "save")
    parameters = original_parameters(model)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    problems = ["it is merged for a time; unmerge(model) first"] if tuning.merged is not None else []
    if not problems:
        problems += [f"{name} trains, but not by the config" for name in trained if name not in tuning.plan.parameters]
        problems += [f"{name} should train, but is frozen" for name in tuning.plan.parameters if name not in trained]
    refuse(problems, "this model cannot be saved as an adapter:")
    with atomic_folder(folder) as temporary:
        tensors = {_key(name): p.detach().cpu().contiguous() for name, p in trained.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        described = {"peft_type": tuning.config.peft_type, "base_model_name_or_path": base, "task_type": None}
        described |= {"inference_mode": True} | tuning.config.to_peft(tuning.plan)
        write_json(temporary / PEFT_CONFIG, described)
        own = {
            "format": FORMAT,
            "method": tuning.config.name,
            "config": to_dict(tuning.config),
            "base_fingerprint": fingerprint(model, tuning.plan.parameters),
            "tokenizer_fingerprint": _tokenizer(model),
            "weights_sha256": sha256_file(temporary / WEIGHTS),
        }
        write_json(temporary / OWN_CONFIG, own)


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> Report:
    """Tune `model`, the base, as `folder` says and copy the saved values in.

    Raises one ValueError listing all that is wrong, with the model unchanged: a damaged file, another format, another
    base or tokenizer, targets that do not exist, missing, unexpected or mis-shaped tensors. `check_base=False` accepts
    another base of the same shapes, such as a bfloat16 copy. A folder written by peft names no base to compare with.
    """
    folder = Path(folder)
    config, own = _config(model, folder)
    problems: list[str] = []
    if tuning_of(model) is not None:
        problems.append("the model is tuned already; merge(model) or unload(model) it first")
    plan = None if problems else _plan(model, config, problems)
    damage: list[str] = []
    tensors = _read(folder / WEIGHTS, own.get("weights_sha256", "none") if own else None, damage)
    refuse(damage, f"the adapter in {folder} is damaged, so nothing was loaded:")
    if plan is not None:
        if own and check_base and fingerprint(model, plan.parameters) != own.get("base_fingerprint"):
            problems.append(
                "it was trained on a base with other weights: give that one (in Python, check_base=False uses this)"
            )
        problems += _misfits(plan, tensors)
    if own.get("tokenizer_fingerprint") and _tokenizer(model) not in (None, own["tokenizer_fingerprint"]):
        problems.append("it was trained with another tokenizer than this model's")
    refuse(problems, f"the adapter in {folder} does not fit this {type(model).__name__}, which is unchanged:")
    report = tune(model, config)
    with torch.no_grad():
        parameters = original_parameters(model)
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return report


def fingerprint(model: nn.Module, trained: Collection[str]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the weights and saved buffers that do not train."""
    named: dict[str, Tensor] = {name: p for name, p in original_parameters(model).items() if name not in trained}
    for name, _, module in original_modules(model):
        saved = module.state_dict(keep_vars=True)
        named |= {join(name, leaf): b for leaf, b in module.named_buffers(recurse=False) if leaf in saved}
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _config(model: nn.Module, folder: Path) -> tuple[Method, dict[str, Any]]:
    """The config, and what else minillm.json says (nothing, in a folder that peft wrote)."""
    if not (folder / OWN_CONFIG).exists():
        path, types = folder / PEFT_CONFIG, {cls.peft_type: cls for cls in METHODS.values()}
        fields = read_json(path)
        cls = _choose(path, types, fields, "peft_type")
        try:
            return cls.from_peft(fields, model), {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    path = folder / OWN_CONFIG
    own = read_json(path)
    _choose(path, {FORMAT: None}, own, "format")
    return from_dict(_choose(path, METHODS, own, "method"), own.get("config"), where=f"{path}: config."), own


def _choose(path: Path, known: Mapping[Any, Any], fields: Any, key: str) -> Any:
    """known[fields[key]], or an error saying what this minillm reads."""
    value = fields.get(key) if isinstance(fields, dict) else fields
    if value not in known:
        raise ValueError(f"{path} has {key} {value!r}; this minillm reads {', '.join(map(str, known))}")
    return known[value]


def _plan(model: nn.Module, config: Method, problems: list[str]) -> Plan | None:
    try:
        return config.plan(model)
    except ValueError as error:
        problems.extend(str(error).splitlines())
        return None


def _read(path: Path, checksum: str | None, problems: list[str]) -> dict[str, Tensor] | None:
    """The tensors of the file by original path, None if it is not whole; peft's folders have no checksum."""
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {_name(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
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


def _key(name: str) -> str:
    """peft's name of a parameter: its adapters are linear layers, with a weight each."""
    return PREFIX + name + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")


def _name(key: str) -> str:
    name = key.removeprefix(PREFIX)
    return name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name


def _tokenizer(model: nn.Module) -> str | None:
    return getattr(model, "tokenizer_fingerprint", None)  # models of other libraries have none
