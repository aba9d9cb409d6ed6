"""Prefixes in the files of Hugging Face peft: one tensor with the keys and values of all layers side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.doors import entrances
from minillm.peft.peft_tasks import described, refuse_task, task_of
from minillm.peft.prefix_sites import Site

PEFT_PART = {"decoder": "decoder", "encoder": "encoder", "encoder_decoder": "decoder"}  # by the model's kind
PEFT_KEY = "prompt_embeddings"


def describe(model: nn.Module, sites: Sequence[Site], plain: bool) -> dict[str, Any]:
    """The fields of adapter_config.json, with a type that peft refuses where it computes something else.

    `plain`: the prefix is what its parameters are, with no network and no gates.
    """
    site, part = sites[0], PEFT_PART[sites[0].config.kind]
    reason = _reason(model, site.config)
    if not reason and {site.part for site in sites} != {part}:
        reason = f'peft has a prefix in the self-attention of one stack alone, parts=("{part}",)'
    if not reason and not plain:
        reason = "peft's files have plain keys and values, no gates and no network"
    fields = described(model, "PREFIX_TUNING", reason)
    if "task_type" not in fields:
        return fields
    return fields | {
        "num_layers": num_places(sites),
        "num_attention_heads": site.config.num_kv_heads,
        "token_dim": site.num_features,
        "encoder_hidden_size": site.num_features,
        "num_transformer_submodules": 1 + (site.config.kind == "encoder_decoder"),
        "prefix_projection": False,
    }


def _reason(model: nn.Module, config: Any) -> str:
    if config.kind == "encoder_decoder" and task_of(model) != "SEQ_2_SEQ_LM":
        return "transformers' encoder-decoders take a prefix of peft only as language models"
    return ""


def num_places(sites: Sequence[Site]) -> int:
    """How many places for a layer's keys and values, (P, 2 G K) each, peft's tensor has when we write it.

    In an encoder-decoder peft 0.21 lets layer i read place 2 i mod their number: of an even number two layers always
    share a place, and half of them are never read. So there are twice as many then, every other one idle.
    """
    return len(sites) * (1 + (sites[0].config.kind == "encoder_decoder" and len(sites) % 2 == 0))


def places(kind: str, layers: int, number: int) -> list[int] | None:
    """Of `number` places each layer's; None if peft writes no such number for so many layers."""
    if kind == "encoder_decoder":
        return [2 * i % number for i in range(layers)] if number in (layers, 2 * layers) else None
    return list(range(layers)) if number == layers else None


def peft_parts(fields: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """The part of a model that peft gives a prefix. Raises ValueError where it reads it otherwise than we would."""
    config = next((body.config for _, body in entrances(model)), None)
    if config is None:
        return ()
    refuse_task(fields, model, _reason(model, config))
    stacks = 1 + (config.kind == "encoder_decoder")
    if (given := fields.get("num_transformer_submodules") or stacks) != stacks:
        raise ValueError(
            f"num_transformer_submodules={given}: on this kind of model peft reads the prefix with {stacks}"
        )
    heads, size = fields.get("num_attention_heads") or 1, fields.get("token_dim")
    if (heads, size) != (config.num_kv_heads, config.num_kv_heads * config.head_dim):
        raise ValueError(
            f"the prefix has num_attention_heads={heads} in token_dim={size}, but the model {config.num_kv_heads} "
            f"key/value heads of {config.head_dim} features"
        )
    return (PEFT_PART[config.kind],)


def join_layers(names: Sequence[str], kind: str, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's tensors of an adapter's: the prefixes `names`, one for each layer, side by side, and the rest."""
    rest = {f"base_model.{name}": tensor for name, tensor in tensors.items() if name not in names}
    layers = [torch.zeros_like(tensors[names[0]])] * number
    for place, name in zip(places(kind, len(names), number), names, strict=True):
        layers[place] = tensors[name]
    return {PEFT_KEY: torch.cat(layers, dim=1)} | rest


def split_layers(names: Sequence[str], kind: str, size: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back; a layer's prefix is (P, `size`). A tensor that is not theirs stays, for others to say so."""
    tensors = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items()}
    number, over = divmod(tensors[PEFT_KEY].shape[-1], size)
    if over or tensors[PEFT_KEY].dim() != 2 or (order := places(kind, len(names), number)) is None:
        return tensors
    layers = tensors.pop(PEFT_KEY).split(size, dim=1)
    return tensors | {name: layers[place].clone() for place, name in zip(order, names, strict=True)}
