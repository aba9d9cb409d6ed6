"""The head of a classifier beside its adapter: what `load` needs to build it again."""

from pathlib import Path
from typing import Any

from torch import nn

from minillm.config import from_dict, to_dict
from minillm.files import read_json
from minillm.models import HeadConfig, put_head
from minillm.models.heads import Head

HEAD_FILE = "head.json"


def put_new_head(model: nn.Module, head: HeadConfig) -> Head:
    """A new head on the body of `model`, in the place of the head it has."""
    body = model.body if isinstance(model, Head) else model
    for stack in (body, getattr(body, "decoder", None)):
        if getattr(stack, "lm_head", None) is not None:
            stack.lm_head = None
    return put_head(body, head)


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
