"""LoRA and (IA)3 in peft's layout: from our layers to those of transformers, and back.

Of each side `fields` are those of adapter_config.json, and `layers` the adapters' tensors by module and leaf.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.finetune.hub_fusing import LoRA, cut, fuse, fuse_factors
from minillm.finetune.hub_rules import by_pattern, feedforward, say_pattern, say_targets, targeted
from minillm.models.families.module_names import HubModule, HubNames
from minillm.peft.method import PREFIX

LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
FACTORS = "ia3_l"
LEAVES = (*LINEAR, *EMBEDDING, FACTORS)

Layers = Mapping[str, Mapping[str, Tensor]]


class Adapter(NamedTuple):
    """What adapter_config.json and adapter_model.safetensors hold."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def lora_to_hub(names: HubNames, fields: Mapping[str, Any], layers: Layers, problems: list[str]) -> Adapter:
    """One LoRA for each of their layers. alpha is such that the scale stays, whatever the rank has become."""
    tensors, ranks, alphas = {}, {}, {}
    for place, parts in _together(names, layers):
        leaves = LINEAR if LINEAR[0] in layers[parts[0]] else EMBEDDING
        loras = {part: LoRA(*(layers[part][leaf] for leaf in leaves), _scale(fields, part)) for part in parts}
        A, B, scale = fuse(place, loras)
        for path in place.paths:
            ranks[path], alphas[path] = len(A), _alpha(fields, scale, len(A))
            tensors |= {
                f"{PREFIX}{path}.{leaf}": t.clone().contiguous() for leaf, t in zip(leaves, (A, B), strict=True)
            }
    said = _say_sizes(fields, ranks, alphas)
    return Adapter(said | {"target_modules": say_targets(ranks, paths_of(names))}, tensors)


def lora_from_hub(
    names: HubNames, fields: Mapping, layers: Layers, problems: list[str], ours: Adapter | None
) -> Adapter:
    """A LoRA for each part of theirs; `ours` as in `hub_translation.from_hub`."""
    tensors, ranks, alphas = {}, {}, {}
    for path in targeted(fields, paths_of(names)):
        rank, alpha = _size(fields, path)
        ranks |= dict.fromkeys(names.at(path).parts, rank)
        alphas |= dict.fromkeys(names.at(path).parts, alpha)
    for place, path, leaves in _places(names, layers, problems):
        A, B = (leaves.get(leaf) for leaf in LINEAR)
        if A is None or B is None:
            tensors |= _as_they_are(place, leaves)
        elif A.dim() != 2 or B.shape != (sum(place.sizes), len(A)):
            problems.append(f"mis-shaped: {path}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}")
        else:
            fused = LoRA(A, B, _scale(fields, path))
            wanted = {part: (len(A), fused.scale) for part in place.parts} if ours is None else _wanted(place, ours)
            for part, lora in cut(place, fused, wanted).items():
                tensors |= {f"{PREFIX}{part}.{LINEAR[0]}": lora.A, f"{PREFIX}{part}.{LINEAR[1]}": lora.B.contiguous()}
    return Adapter(_say_sizes(fields, ranks, alphas) | {"target_modules": _short(ranks, names.modules)}, tensors)


def factors_to_hub(names: HubNames, fields: Mapping[str, Any], layers: Layers, problems: list[str]) -> Adapter:
    """(IA)3's factors: those of fused outputs one below the other."""
    tensors, inner, paths = {}, [], []
    for place, parts in _together(names, layers):
        factors = {part: layers[part][FACTORS] for part in parts}
        inputs = [part for part in parts if feedforward(fields, part)]
        if inputs and len(place.parts) > 1:
            problems.append(
                f"{', '.join(inputs)}: transformers has one layer for {', '.join(place.parts)}, whose input cannot be "
                "scaled for one of them: leave it out of `feedforward`"
            )
        fused = factors[inputs[0]] if inputs else fuse_factors(place, factors)
        tensors |= {f"{PREFIX}{path}.{FACTORS}": fused.clone() for path in place.paths}
        inner += place.paths if inputs else ()
        paths += place.paths
    loose = [path for path in paths if path.endswith(tuple(inner))]  # peft compares the ends of texts
    said = inner if loose == inner else "|".join(map(re.escape, inner))
    return Adapter({"target_modules": say_targets(paths, paths_of(names)), "feedforward_modules": said}, tensors)


def factors_from_hub(
    names: HubNames, fields: Mapping[str, Any], layers: Layers, problems: list[str], ours: Adapter | None
) -> Adapter:
    """The factors of each part of theirs; on an input each part has them all."""
    tensors, paths = {}, targeted(fields, paths_of(names))
    for place, path, leaves in _places(names, layers, problems):
        factors, inner = leaves.get(FACTORS), feedforward(fields, path)
        if factors is None:
            tensors |= _as_they_are(place, leaves)
        elif not inner and factors.shape != (sum(place.sizes), 1):
            problems.append(f"mis-shaped: {path}.{FACTORS}: {tuple(factors.shape)}, not {(sum(place.sizes), 1)}")
        else:
            each = [factors] * len(place.parts) if inner else factors.split(place.sizes)
            keys = {f"{PREFIX}{part}.{FACTORS}": rows for part, rows in zip(place.parts, each, strict=True)}
            tensors |= {key: rows.clone() for key, rows in keys.items() if ours is None or key in ours.tensors}
    parts = [part for path in paths for part in names.at(path).parts]
    inner = [part for path in paths if feedforward(fields, path) for part in names.at(path).parts]
    said = {"target_modules": _short(parts, names.modules), "feedforward_modules": _short(inner, parts)}
    return Adapter(said, tensors)


def paths_of(names: HubNames) -> list[str]:
    """Every module of theirs that has a weight."""
    return list(dict.fromkeys(path for module in names.modules.values() for path in module.paths))


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in shape and values, whatever the dtype."""
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _together(names: HubNames, layers: Collection[str]) -> list[tuple[HubModule, list[str]]]:
    """Our layers, those together that are one module of theirs."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in layers:
        groups.setdefault(names.modules[name].paths, []).append(name)
    return [(names.modules[parts[0]], parts) for parts in groups.values()]


def _places(names: HubNames, layers: Layers, problems: list[str]) -> Iterator[tuple[HubModule, str, Mapping]]:
    """(place, a path, its tensors) of each of their layers in the file that is in the model too."""
    done = set()
    for path, leaves in layers.items():
        place = names.at(path)
        if place is None:
            problems += [f"unexpected: {PREFIX}{path}.{leaf} {tuple(tensor.shape)}" for leaf, tensor in leaves.items()]
        elif place.paths not in done:
            done.add(place.paths)
            problems += [f"missing:    {copy}: it repeats {path}" for copy in place.paths if copy not in layers]
            copies = [layers[copy] for copy in place.paths if copy in layers]
            if any(set(c) != set(leaves) or not all(same(c[leaf], leaves[leaf]) for leaf in c) for c in copies):
                problems.append(f"different:  {' and '.join(place.paths)}: one module here, which has one adapter")
            yield place, path, leaves


def _as_they_are(place: HubModule, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An embedding's tensors; or what is incomplete, for others to say so."""
    return {f"{PREFIX}{place.parts[0]}.{leaf}": tensor for leaf, tensor in leaves.items()}


def _wanted(place: HubModule, ours: Adapter) -> dict[str, tuple[int, float]]:
    """Rank and scale of each part that had a LoRA when it was saved."""
    shapes = {part: ours.tensors.get(f"{PREFIX}{part}.{LINEAR[0]}") for part in place.parts}
    return {part: (len(A), _scale(ours.fields, part)) for part, A in shapes.items() if A is not None}


def _size(fields: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Rank and alpha."""
    rank = by_pattern(fields.get("rank_pattern"), path, fields.get("r", 8))
    return rank, by_pattern(fields.get("alpha_pattern"), path, fields.get("lora_alpha", 8))


def _scale(fields: Mapping[str, Any], path: str) -> float:
    rank, alpha = _size(fields, path)
    return alpha / _root(fields, rank)


def _alpha(fields: Mapping[str, Any], scale: float, rank: int) -> float | int:
    """A whole number where that gives the same scale: servers expect one."""
    alpha = scale * _root(fields, rank)
    return round(alpha) if round(alpha) / _root(fields, rank) == scale else alpha


def _root(fields: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if fields.get("use_rslora") else rank


def _say_sizes(fields: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    rank, rank_pattern = say_pattern(ranks, fields.get("r", 8))
    alpha, alpha_pattern = say_pattern(alphas, fields.get("lora_alpha", 8))
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _short(wanted: Collection[str], among: Collection[str]) -> list[str]:
    """The last segments of the names, where they mean exactly these."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in wanted)
    return list(ends if {n for n in among if n.rpartition(".")[2] in ends} == set(wanted) else wanted)
