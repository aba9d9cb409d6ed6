"""Finding and loading what a folder holds: a run, a model, an adapter, a tokenizer."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from minillm.config import nearest
from minillm.files import read_json
from minillm.models import Decoder, EncoderDecoder
from minillm.models import load as load_any
from minillm.peft import Report, load_adapter
from minillm.recipes.head import put_new_head, read_head
from minillm.recipes.under import put_under, read_under
from minillm.shipped import find_shipped, models_folder, near_shipped, shipped_models, shipped_name
from minillm.tokenizers import Tokenizer, check_same, load_tokenizer
from minillm.tokenizers.folder import BPE, FILES, WORDPIECE


def quote(path: str | Path) -> str:
    """A path as one word of a command that a person may copy."""
    return shlex.quote(str(path))


def relative_to(folder: Path, start: Path) -> str:
    """Where `folder` is, seen from `start`: so both can be moved together. A shipped model is known by its name."""
    return shipped_name(folder) or os.path.relpath(folder.resolve(), start.resolve())


class Located(NamedTuple):
    """What a path leads to, and the folder that holds it."""

    kind: Literal["model", "adapter"]
    folder: Path


class Loaded(NamedTuple):
    """A model ready for use, its own tokenizer, and what was tuned, if it was."""

    model: Decoder | EncoderDecoder
    tokenizer: Tokenizer
    report: Report | None
    labels: Sequence[str] = ()  # the classes of a classifier


WEIGHTS = (  # as we and transformers call them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def locate(path: str | Path) -> Located:
    """The model or adapter of a run, model or adapter folder, or of a name that minillm ships.

    ValueError says what is there instead.
    """
    path = find_shipped(path)
    for folder in (path, path / "model", path / "adapter"):
        if (folder / "optimizer.pt").is_file():
            raise ValueError(
                f"{path} is a checkpoint, to resume a run from, and no model: when the run is finished, name it itself "
                f"({path.absolute().parent.parent})"
            )
        if any((folder / name).is_file() for name in WEIGHTS):
            return Located("model", folder)
        if (folder / "adapter_config.json").is_file():
            return Located("adapter", folder)
    raise ValueError(_what_is_there(path))


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f"{path} is a file; name the folder of a run, model or adapter, such as {path.parent}"
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = f"; did you mean {nearest(path.name, sorted(siblings)[:50])}?" if siblings else ""
        return f"{path} does not exist (working folder: {Path.cwd()}){guess}{near_shipped(path)}"
    if (path / "config.json").is_file() and (path / "environment.json").is_file():
        recipe = read_json(path / "config.json").get("recipe", "pretrain")
        if recipe == "tokenizer":
            return f"{path} holds a tokenizer and no model: use it in training with tokenizer.folder={quote(path)}"
        if recipe == "demo":
            return f"{path} is a demo: its model is in {path / 'base'}, and tuned in {path / 'LoRA'} and beside it"
        return (
            f"{path} is a run that has not finished: minillm {recipe} run={quote(path)} --resume trains it to its end"
        )
    return f"{path} is no run, model or adapter; it holds {sorted(entry.name for entry in path.iterdir())[:20]}"


def holds_tokenizer(folder: Path) -> bool:
    """Whether there are files that `load_tokenizer` makes a tokenizer of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *FILES, WORDPIECE[0], BPE[0]))


def find_tokenizer(path: str | Path) -> Path:
    """The folder of the tokenizer that belongs to a run, model, adapter or tokenizer folder."""
    path = find_shipped(path)
    for folder in (path, path / "tokenizer", path / "model"):
        if holds_tokenizer(folder):
            return folder
    if not path.is_dir():
        raise ValueError(_what_is_there(path))
    if any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter")):
        return find_base(locate(path).folder)
    raise ValueError(f"{path} has no tokenizer; it holds {sorted(entry.name for entry in path.iterdir())[:20]}")


def find_base(adapter: Path, base: str = "") -> Path:
    """The model folder of an adapter's base: `base` if given, else where the adapter says, seen from its folder."""
    recorded = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not (base or recorded):
        raise ValueError(f"the adapter in {adapter} does not say what its base is: give base=FOLDER")
    place = Path(base) if base else recorded_base(adapter, recorded)
    try:
        found = locate(place)
    except ValueError as error:
        advice = "" if base else "\nIf it was moved, say where it is now: base=FOLDER"
        raise ValueError(f"the base of the adapter in {adapter} is not to be found: {error}{advice}") from None
    if found.kind != "model":
        raise ValueError(f"the base of the adapter in {adapter} must be a model, but {place} is an adapter itself")
    return found.folder


def recorded_base(adapter: Path, recorded: str) -> Path:
    """What an adapter's config says of its base: a place seen from the adapter's folder, or a shipped model's name."""
    beside = Path(os.path.normpath(adapter / recorded))
    return models_folder() / recorded if not beside.is_dir() and recorded in shipped_models() else beside


def load(path: str | Path, *, base: str = "", device: torch.device | str = "cpu", writes: bool = True) -> Loaded:
    """The model in eval mode, with its adapter if `path` leads to one (not merged), and the model's own tokenizer.

    `writes`: it must have an LM head, as all that continues text needs it.
    """
    kind, folder = locate(path)
    if kind == "model":
        if base:
            raise ValueError(f"base={base}: {path} is a whole model and needs no base; leave it out")
        return load_base(folder, device, writes=writes)
    head = read_head(folder)
    if head and writes:
        names = ", ".join(head[1])
        raise ValueError(
            f"{path} is a classifier ({names}), which writes no text: minillm classify asks it, and with data.label "
            "minillm tune goes on from it"
        )
    model, tokenizer, *_ = load_base(find_base(folder, base), device, writes=writes)
    model = put_new_head(model, head[0]).to(device) if head else model
    put_under(model, read_under(folder))
    report = load_adapter(model, folder)
    note_untied_head(model)
    return Loaded(model.eval(), tokenizer, report, head[1] if head else ())


def load_base(folder: Path, device: torch.device | str = "cpu", *, writes: bool = True) -> Loaded:
    """The model of a model folder and the tokenizer beside it, which must be the one the model was trained with.

    `writes`: it must have an LM head, as all that continues text needs it.
    """
    model, tokenizer = load_any(folder, device=device), load_tokenizer(folder)
    if writes and (not isinstance(model, Decoder | EncoderDecoder) or model.lm_head is None):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, which writes no text: tune and generate take models with an LM "
            "head; use this one in Python, with minillm.load"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}: they "
            "do not belong together"
        )
    if model.tokenizer_fingerprint is not None:
        check_same(model.tokenizer_fingerprint, tokenizer, str(folder))
    return Loaded(model, tokenizer, None)


def note_untied_head(model: Decoder) -> None:
    """Let the config say so when partial tuning has given the head a matrix of its own."""
    head = getattr(model, "lm_head", None)
    plain = type(head) is torch.nn.Linear  # the weight of a wrapped head is computed anew each time
    if plain and model.config.tie_embeddings and model.lm_head.weight is not model.embed_tokens.weight:
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
