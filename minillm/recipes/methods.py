"""`minillm methods`: every way of tuning, and what it would train in a given model."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minillm.files import read_json
from minillm.models import build
from minillm.models.cards import CARDS, find_card
from minillm.models.families.configs import find_family, read_config
from minillm.models.io import build_described
from minillm.peft import METHODS, Method, num_parameters
from minillm.recipes.common import format_table
from minillm.recipes.info import is_hub_folder
from minillm.recipes.locate import locate

DEFAULT = "gpt2"
DEPENDS = {  # on more than the model
    "pruned_bitfit": "minillm tune scores all biases first, and trains pruned_bitfit.keep=0.25 of their entries",
    "fusion": "minillm tune fuses tuned bottlenecks: adapters=a:runs/one,b:runs/two",
}


class Row(NamedTuple):
    """One method on one model."""

    name: str
    title: str
    count: str  # of trained values; "-" where the method's default settings do not fit the model
    percent: str
    merges: bool
    stacks: str
    hub_type: str
    paper: str
    note: str  # why it does not fit


def methods(what: str | None = None) -> str:
    """A table of all methods with their default settings, on a model card or the model in a folder; GPT-2 unless given.

    Nothing is built and no weight is read: the trained values are each method's own formula.
    """
    found = describe(what or DEFAULT)
    header = ("method", "what it is", "trains", "%", "merges", "stacks with", "peft type", "paper")
    rows = [(*row[:4], "yes" if row.merges else "no", *row[5:8]) for row in found]
    notes = [f"- {row.name}: {row.note}" for row in found if row.note]
    formulas = format_table(("method", "values that train"), [(name, m.formula) for name, m in METHODS.items()])
    head = f"{what or DEFAULT}: {_size(_shape_of(what or DEFAULT)):,} values; each method with its default settings"
    return "\n\n".join([head, format_table(header, rows), *(["\n".join(notes)] if notes else []), formulas])


def describe(what: str) -> list[Row]:
    """Every method on the model card or the model in the folder `what`."""
    model, rows = _shape_of(what), []
    for name, method in METHODS.items():
        count = percent = "-"
        note = ""
        try:
            trained = num_parameters(method(), model)
            count, percent = f"{trained:,}", f"{100 * trained / _size(model):.3f}"
        except ValueError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            note = DEPENDS.get(name) or (lines[1] if len(lines) > 1 else lines[0])
        merges, paper = not method.cannot_merge, method.paper or "-"
        rows.append(Row(name, method.title, count, percent, merges, method.stacks, hub_type(method), paper, note))
    return rows


def hub_type(method: type[Method]) -> str:
    """Hugging Face peft's word for what the method's files hold, "-" where it cannot read them."""
    return method.hub_type or ("-" if method.peft_type.startswith("MINILLM") else method.peft_type)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape_of(what: str) -> nn.Module:
    """The model without its weights: shapes are enough for counting."""
    with torch.device("meta"):
        if what.lower() in CARDS:
            return build(find_card(what).config)
        if is_hub_folder(Path(what)):
            described = read_json(Path(what) / "config.json")
            return build(read_config(find_family(described, what), described, what))
        try:
            folder = locate(what)
        except ValueError as error:
            raise ValueError(f"{error}\nNor is {what!r} a model card: minillm info models lists those") from None
        if folder.kind == "adapter":
            raise ValueError(f"{what} is an adapter; name its base, or a model card such as {DEFAULT}")
        return build_described(read_json(folder.folder / "config.json"), where=f"{folder.folder / 'config.json'}: ")
