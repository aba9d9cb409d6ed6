"""What our modules and parameters are called in the transformers model of the same weights.

Needed by what belongs to single modules, such as adapters. The names follow from the family's tables and the model's
config alone, so they are the same whether or not something is wrapped around the model's modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.models.build import build, build_body
from minillm.models.config import ModelConfig
from minillm.models.families.family import Architecture, Family
from minillm.models.families.keys import Entry, Names, entries, tied_keys
from minillm.models.families.save import architecture_for, family_for
from minillm.models.heads import Head, build_with_head


@dataclass(frozen=True)
class HubModule:
    """Where one of our modules with a weight stands in the transformers model.

    `paths`: the module there; of an embedding matrix with a copy on each side, both copies, since these are what a
    text goes through. Where theirs is fused, ours are `parts`, this one being its outputs `start` to `stop`.
    """

    paths: tuple[str, ...]
    start: int
    stop: int
    parts: tuple[str, ...]  # ours, in the order of their outputs
    sizes: tuple[int, ...]  # of each part, in outputs
    transposed: bool  # the weight is stored (in, out)
    skipped_rows: int  # of an embedding table: its first rows, which no position uses


@dataclass(frozen=True)
class HubNames:
    """`modules`: ours by name. `entries`: every tensor of a checkpoint, with the parameters of ours that it holds."""

    family: Family
    architecture: Architecture
    modules: Mapping[str, HubModule]
    entries: tuple[Entry, ...]
    copies: Mapping[str, tuple[str, ...]]  # key of a tied embedding -> the keys of the modules that a text goes through
    state: Mapping[str, Entry]  # every key of their model's state; tied parameters have several

    def at(self, path: str) -> HubModule | None:
        """One of our modules that stands at their `path` (of a fused one any part); None if none does."""
        return next((module for module in self.modules.values() if path in module.paths), None)

    def keys(self, entry: Entry) -> tuple[str, ...]:
        """The entry's names in the state of their model: one, or those of its copies."""
        return self.copies.get(entry.key, (entry.key,))


def hub_names(model: nn.Module) -> HubNames:
    """The names of a model that `save_hf` can write; what was put into it since does not matter.

    Raises ValueError when no family of the Hub holds such a model, with the families and their reasons.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"a {type(model).__name__} is no model of ours that transformers has too (the decoders, encoders and "
            "encoder-decoders of minillm.models, and heads on them)"
        )
    family = family_for(config, None, getattr(model, "origin", None))
    architecture = architecture_for(family, model)
    bare = _bare(model, config)
    found = tuple(entries(family, architecture, bare, architecture.prefix))
    state = {entry.key: entry for entry in found}
    tied = tied_keys(family, architecture, bare, architecture.prefix)
    state |= {again: state[of] for again, of in tied.items() if of in state}
    copies: dict[str, tuple[str, ...]] = {}
    for again, of in family.repeats.items():
        key = of.format(prefix=architecture.prefix)
        copies[key] = (*copies.get(key, ()), again.format(prefix=architecture.prefix))
    modules = {name: module for entry in found for name, module in _modules(entry, copies).items()}
    modules |= _tied(family, architecture, bare, modules)
    return HubNames(family, architecture, modules, found, copies, state)


def split(entry: Entry, tensor: Tensor) -> dict[str, Tensor]:
    """The values of our parameters in a checkpoint's tensor: what `entry.join` joined."""
    rows = (tensor.t() if entry.transposed else tensor)[entry.skipped_rows :]
    return dict(zip(entry.parameters, rows.split(entry.sizes), strict=True))


def _bare(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model without weights and without anything put into it since."""
    with torch.device("meta"):
        if isinstance(model, Head):
            return build_with_head(config, model.head_config)
        return build_body(config) if getattr(model, "lm_head", None) is None else build(config)


def _modules(entry: Entry, copies: Mapping[str, tuple[str, ...]]) -> dict[str, HubModule]:
    if not all(name.endswith(".weight") for name in (entry.key, *entry.parameters)):
        return {}
    paths = tuple(key.removesuffix(".weight") for key in copies.get(entry.key, (entry.key,)))
    parts = tuple(name.removesuffix(".weight") for name in entry.parameters)
    modules, start = {}, 0
    for name, size in zip(parts, entry.sizes, strict=True):
        place = (paths, start, start + size, parts, entry.sizes)
        modules[name] = HubModule(*place, entry.transposed, entry.skipped_rows)
        start += size
    return modules


def _tied(family: Family, architecture: Architecture, bare: nn.Module, known: Mapping) -> dict[str, HubModule]:
    """Modules whose weight is another one's, such as a tied head: checkpoints hold it only once."""
    names = Names(family, architecture, architecture.prefix, headed=isinstance(bare, Head))
    tied = {}
    for name, weight in bare.named_parameters(remove_duplicate=False):
        ours, _, leaf = name.rpartition(".")
        if leaf == "weight" and ours not in known and names.known(name):
            path = names.key(name)[0].removesuffix(".weight")
            tied[ours] = HubModule((path,), 0, len(weight), (ours,), (len(weight),), False, 0)
    return tied
