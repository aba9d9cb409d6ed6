"""The adapters that a tuned model's adapter stands on: where they lie, and how they come on a model."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.files import read_json
from minillm.models.heads import Head
from minillm.peft import FullConfig, Method, PartialConfig, activate, load_adapter, tune, tunings_of
from minillm.peft.names import collapse
from minillm.peft.record import Tuning

UNDER_FILE = "under.json"


def describe_under(folder: Path, places: Sequence[Path]) -> dict[str, Any]:
    """The file that says in `folder` where the adapters lie that it stands on, the lowest first; no file for none.

    The places are written as seen from `folder`, so that all can be moved together.
    """
    return {UNDER_FILE: [os.path.relpath(place.resolve(), folder.resolve()) for place in places]} if places else {}


def read_under(folder: Path) -> list[Path]:
    """The folders of the adapters that the one in `folder` stands on, the lowest first; empty if it stands on none."""
    path = folder / UNDER_FILE
    if not path.is_file():
        return []
    listed = read_json(path)
    if not (isinstance(listed, list) and all(isinstance(place, str) for place in listed)):
        raise ValueError(f"{path}: expected a list of folders, not {listed!r}")
    places = [Path(os.path.normpath(folder / place)) for place in listed]
    if gone := [str(place) for place in places if not (place / "adapter_config.json").is_file()]:
        raise ValueError(
            f"the adapter in {folder} stands on others, which are not there: {', '.join(gone)}. Put them back, or copy "
            "the whole run folder instead of its adapter alone"
        )
    return places


def put_under(model: nn.Module, places: Sequence[Path]) -> None:
    """Load these adapters by the names of their folders and let all of them be active.

    Their base is not compared, as the model may have a new head: the adapter above them knows base, and them.
    """
    for place in places:
        if tunings_of(model):
            activate(model, *read_json(place / "minillm.json")["under"])
        load_adapter(model, place, place.name, check_base=False)
    if places:
        activate(model, *(place.name for place in places))


def adopt(source: nn.Module, model: nn.Module, names: Mapping[str, str]) -> None:
    """Put the adapters of `source` on `model`, which has the same body and may have another head, named by `names`.

    The head of `source` stays behind, also where an adapter has trained it. Raises ValueError where a config says by
    full names what only `source` has.
    """
    for old, tuning in tunings_of(source).items():
        if tunings_of(model):
            activate(model, *(names[other] for other in tuning.under))
        tune(model, _without_head(tuning.config, source), names[old])
        values, own = _of_body(source, tuning), _of_body(model, tunings_of(model)[names[old]])
        if isinstance(model, Head):  # a decoder's answer to the next token is a head, too
            values = {name: value for name, value in values.items() if not name.startswith("lm_head.")}
        if other := [name for name in {**values, **own} if _shape(values, name) != _shape(own, name)]:
            raise ValueError(
                f"{tuning.config.name} trained other values in that {type(source).__name__} than it would in this "
                f"{type(model).__name__}: {', '.join(collapse(other))}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])
    activate(model, *names.values())


def _head(model: nn.Module) -> set[str]:
    """The names of the modules that make a body's answer; empty for a model that has no head of ours."""
    return {name for name, _ in model.named_children()} - {"body"} if isinstance(model, Head) else set()


def _without_head(config: Method, model: nn.Module) -> Method:
    """The config for the body alone."""
    field = "modules" if isinstance(config, PartialConfig) else "trainable"
    if isinstance(config, FullConfig) or not (head := _head(model)):
        return config
    kept = tuple(name for name in getattr(config, field) if name not in head)
    return dataclasses.replace(config, **{field: kept})


def _of_body(model: nn.Module, tuning: Tuning) -> dict[str, Tensor]:
    """What an adapter trains below the head, by the names that the body alone would give."""
    head = _head(model)
    named = tuning.parameters().items()
    return {name.removeprefix("body.") if head else name: p for name, p in named if name.partition(".")[0] not in head}


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
