"""`minillm info`: what runs here, what a folder holds, or how large a well-known model is."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from minillm.config import to_dict
from minillm.files import read_json
from minillm.models import ModelConfig, build, count_parameters
from minillm.models.cards import CARDS, find_card
from minillm.models.families.configs import find_family, read_config
from minillm.models.io import build_described
from minillm.recipes.kernels import describe_ops
from minillm.recipes.locate import WEIGHTS, find_tokenizer, holds_tokenizer, locate, quote, recorded_base
from minillm.recipes.model_info import InfoConfig, describe_card, describe_costs, list_cards, parts_table
from minillm.recipes.under import read_under
from minillm.shipped import find_shipped
from minillm.tokenizers import load_tokenizer
from minillm.training import Records, list_checkpoints
from minillm.training.run_folder import environment

DEFAULTS = InfoConfig()


def info(what: str | None = None, config: InfoConfig = DEFAULTS) -> str:
    """A text about this machine (None), a model card by its name, all cards ("models"), or a folder.

    A name that is a card's and a folder's means the card; "./name" is the folder.
    """
    if what is None:
        return describe_machine()
    if what == "models":
        return list_cards()
    if what.lower() in CARDS:
        return describe_card(find_card(what), config)
    if Path(what).name == what and not find_shipped(what).exists():  # a name, not a path
        try:
            find_card(what)
        except ValueError as error:
            raise ValueError(f"{error}\nNor is there a folder {what} in {Path.cwd()}.") from None
    return describe_folder(what, config)


def describe_machine() -> str:
    """Versions, threads, devices, and which implementation of each op runs, and why nothing faster does."""
    facts = [(name, value if value or value == 0 else "none") for name, value in environment().items()]
    return _section("here", facts) + "\n\n" + describe_ops()


def describe_folder(path: str, config: InfoConfig = DEFAULTS) -> str:
    """Config, sizes, tokenizer and last measurements of a run, model, adapter or tokenizer folder."""
    folder = find_shipped(path)
    parts = [_run(folder)] if (folder / "environment.json").is_file() else []
    if is_hub_folder(folder):
        parts.append(_hub_model(folder, config))
    elif holds_weights(folder):
        kind, found = locate(folder)
        parts.append(_model(found, config) if kind == "model" else _adapter(found))
    elif not parts and not holds_tokenizer(folder):
        locate(folder)  # says what is there instead
    if any(holds_tokenizer(place) for place in (folder, folder / "tokenizer", folder / "model")):
        tokenizer = load_tokenizer(find_tokenizer(folder))
        facts = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
        parts.append(_section("tokenizer", facts.items()))
    return "\n\n".join(parts)


def holds_weights(folder: Path) -> bool:
    """Whether `locate` would find a model or an adapter there."""
    places = (folder, folder / "model", folder / "adapter")
    return any((p / name).is_file() for p in places for name in (*WEIGHTS, "adapter_config.json"))


def is_hub_folder(folder: Path) -> bool:
    """Whether its config.json is one of the Hugging Face Hub's."""
    path = folder / "config.json"
    described = read_json(path) if path.is_file() else {}
    return isinstance(described, dict) and "model_type" in described


def _hub_model(folder: Path, options: InfoConfig) -> str:
    """The sizes of the body (and LM head) that the Hub's config.json describes; its weights are not looked at."""
    where = folder / "config.json"
    described = read_json(where)
    config = read_config(find_family(described, where), described, where)
    with torch.device("meta"):
        model = build(config)
    return _sizes(f"model {folder}", to_dict(config).items(), model, options)


def _run(folder: Path) -> str:
    config = read_json(folder / "config.json")
    recipe = config.get("recipe", "unknown")
    facts: list[tuple[str, Any]] = [("recipe", recipe)]
    records = Records(folder / "metrics.jsonl").read()
    if recipe == "demo":
        return _section(f"demo {folder}", [*facts, ("report", folder / "report.html"), ("model", folder / "base")])
    facts += _flat("last step", next((r for r in reversed(records) if "loss" in r), {}))
    facts += _flat("last evaluation", next((r for r in reversed(records) if "eval" in r), {}))
    checkpoints = list(list_checkpoints(folder))
    facts += [("checkpoints", f"steps {', '.join(map(str, checkpoints))}")] if checkpoints else []
    if (folder / "report.json").is_file():
        facts += _report(folder / "report.json")
    elif recipe in ("pretrain", "tune"):
        facts += [("finished", f"no: minillm {recipe} run={quote(folder)} --resume goes on")]
    return _section(f"run {folder}", facts)


def _report(path: Path) -> list[tuple[str, Any]]:
    try:
        report = read_json(path)
    except ValueError as error:
        return [("report", f"cannot be shown: {error}")]
    return [pair for key, value in report.items() if key != "parameters" for pair in _flat(key, value)]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, inner in value.items() for pair in _flat(f"{name}: {key}", inner)]


def _model(folder: Path, options: InfoConfig) -> str:
    described = read_json(folder / "config.json")
    with torch.device("meta"):  # shapes are enough for counting
        model = build_described(described, where=f"{folder / 'config.json'}: ")
    size = os.path.getsize(folder / "model.safetensors")
    facts = [*described["model"].items(), *_flat("head", described.get("head") or {})]
    return _sizes(f"model {folder}", [*facts, ("weights", f"{size:,} bytes")], model, options)


def _sizes(title: str, facts: Iterable[tuple[str, Any]], model: nn.Module, options: InfoConfig) -> str:
    parts = [_section(title, facts), parts_table(count_parameters(model))]
    if isinstance(model.config, ModelConfig):  # recurrent models have no cache that grows and no attention
        parts.append(describe_costs(model.config, options))
    return "\n\n".join(parts)


def _adapter(folder: Path) -> str:
    described = read_json(folder / "adapter_config.json")
    own = read_json(folder / "minillm.json") if (folder / "minillm.json").is_file() else {}
    base = described.get("base_model_name_or_path")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    facts = [("method", own.get("method", described.get("peft_type"))), *(own.get("config") or {}).items()]
    facts += [("trained values", f"{sum(torch.Size(shape).numel() for shape in shapes):,}")]
    facts += [("weights", f"{os.path.getsize(folder / 'adapter_model.safetensors'):,} bytes"), ("base", base)]
    if under := read_under(folder):
        facts.append(("stands on", ", ".join(f"{place.name} ({_method(place)})" for place in under)))
    if not (base and recorded_base(folder, base).is_dir()):
        facts += [("base found", "no: give base=FOLDER to minillm generate")]
    return _section(f"adapter {folder}", facts)


def _method(adapter: Path) -> str:
    return read_json(adapter / "minillm.json")["method"]


def _section(title: str, facts: Any) -> str:
    lines = [(str(name), f"{value:.5g}" if isinstance(value, float) else str(value)) for name, value in facts]
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])
