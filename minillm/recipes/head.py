"""The head of a classifier beside its adapter: what `load` needs to build it again."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from minillm.config import from_dict, to_dict
from minillm.files import read_json
from minillm.models import HeadConfig, put_head
from minillm.models.heads import Head
from minillm.peft import FullConfig, Method, PartialConfig

HEAD_FILE = "head.json"


def put_new_head(model: nn.Module, head: HeadConfig) -> Head:
    """A new head on the body of `model`, in the place of the head it has."""
    body = model.body if isinstance(model, Head) else model
    stack = getattr(body, "decoder", body)
    if getattr(stack, "lm_head", None) is not None:
        stack.lm_head = None
    return put_head(body, head)


def reading(kind: str) -> dict[str, Any]:
    """How a head reads a body of this kind: a decoder has read the whole text only at its last token."""
    if kind == "encoder":
        return {"pool": "first", "dense": "tanh"}
    return {"pool": "last", "dense": None, "dropout": 0.0}


def beside_head(model: nn.Module, chosen: Method) -> Method:
    """The same method, with all that `model` has beside its body training in full."""
    if isinstance(chosen, FullConfig):
        return chosen
    new = tuple(name for name, child in model.named_children() if name != "body" and list(child.parameters()))
    if isinstance(chosen, PartialConfig):
        modules = () if chosen.modules == PartialConfig().modules else chosen.modules
        return dataclasses.replace(chosen, modules=tuple(dict.fromkeys((*modules, *new))))
    return dataclasses.replace(chosen, trainable=tuple(dict.fromkeys((*chosen.trainable, *new))))


def describe_head(model: Head, labels: list[str]) -> dict[str, Any]:
    """The file that says in an adapter's folder what head it was trained with, and the names of its classes."""
    return {HEAD_FILE: {"head": to_dict(model.head_config), "labels": labels}}


def read_head(folder: Path) -> tuple[HeadConfig, list[str]] | None:
    """The head that an adapter was trained with and the names of its classes; None if it has none of its own."""
    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    described = read_json(path)
    if not isinstance(described, dict):
        raise ValueError(f"{path}: expected a head and its labels, not {described!r}")
    config = from_dict(HeadConfig, described.get("head"), where=f"{path}: head.")
    labels = described.get("labels")
    if not isinstance(labels, list) or len(labels) != config.num_labels:
        raise ValueError(f"{path}: labels: expected {config.num_labels} names, not {labels!r}")
    return config, labels
