"""Prefixes in the files of Hugging Face peft: one tensor with the keys and values of all layers side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.doors import entrances
from minillm.peft.prefix_sites import Site

PEFT_PART = {"decoder": "decoder", "encoder": "encoder", "encoder_decoder": "decoder"}  # by the model's kind
PEFT_TASK = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder_decoder": "SEQ_2_SEQ_LM"}
PEFT_KEY = "prompt_embeddings"


def describe(model: nn.Module, sites: Sequence[Site], plain: bool) -> dict[str, Any]:
    """The fields of adapter_config.json, with a type that peft refuses where it cannot have such a prefix.

    `plain`: the prefix is what its parameters are, with no network and no gates.
    """
    site, body = sites[0], entrances(model)[0][1]
    headed = model is not body or (site.config.kind != "encoder" and getattr(body, "lm_head", None) is None)
    elsewhere = {site.part for site in sites} != {PEFT_PART[site.config.kind]}
    if headed or elsewhere or not plain or len(set(order(sites))) < len(sites):
        return {"peft_type": "MINILLM_PREFIX_TUNING"}
    return {
        "task_type": PEFT_TASK[site.config.kind],
        "num_layers": len(sites),
        "num_attention_heads": site.config.num_kv_heads,
        "token_dim": site.num_features,
        "encoder_hidden_size": site.num_features,
        "num_transformer_submodules": 1 + (site.config.kind == "encoder_decoder"),
        "prefix_projection": False,
    }


def order(sites: Sequence[Site]) -> tuple[int, ...]:
    """For each layer its place in peft's tensor, in which a place has the keys and values (P, 2 G K) of one layer.

    In an encoder-decoder peft 0.21 lets layer i read place 2 i mod L: of an even number of layers two always share a
    place, and half of the places are never read. So such files are read, but written only for an odd number.
    """
    step = 2 if sites[0].config.kind == "encoder_decoder" else 1
    return tuple(step * i % len(sites) for i in range(len(sites)))


def peft_parts(fields: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """The part of a model that peft gives a prefix. Raises ValueError if it was made for heads of another size."""
    config = next((body.config for _, body in entrances(model)), None)
    if config is None:
        return ()
    heads, size = fields.get("num_attention_heads") or 1, fields.get("token_dim")
    if (heads, size) != (config.num_kv_heads, config.num_kv_heads * config.head_dim):
        raise ValueError(
            f"the prefix has num_attention_heads={heads} in token_dim={size}, but the model {config.num_kv_heads} "
            f"key/value heads of {config.head_dim} features"
        )
    return (PEFT_PART[config.kind],)


def join_layers(names: Sequence[str], places: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's tensors of an adapter's: the prefixes `names`, one for each layer, side by side, and the rest."""
    rest = {f"base_model.{name}": tensor for name, tensor in tensors.items() if name not in names}
    layers = {place: tensors[name] for place, name in zip(places, names, strict=True)}
    return {PEFT_KEY: torch.cat([layers[place] for place in sorted(layers)], dim=1)} | rest


def split_layers(names: Sequence[str], places: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    rest = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items() if key != PEFT_KEY}
    layers = tensors[PEFT_KEY].tensor_split(len(names), dim=1)
    return rest | {name: layers[place].clone() for place, name in zip(places, names, strict=True)}
