"""Looking into a model: where its parameters are, and what its attention heads look at."""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.config import nearest
from minillm.layers import Attention
from minillm.models.heads import Head, MultipleChoice

PARTS = {"self_attn": "attention", "cross_attn": "attention", "relative_positions": "attention", "mlp": "mlp"}
KINDS = ("self_attn", "cross_attn")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part: embedding, attention, mlp, norms, head, other, and their total.

    A shared tensor counts once, where it is named first: a tied head counts as embedding. Of a body with a head on
    top (`models/heads`), all that is not the body counts as head.
    """
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "other"), 0)
    headed = isinstance(model, Head)
    for name, parameter in model.named_parameters():
        counts["head" if headed and not name.startswith("body.") else _part(name)] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def _part(name: str) -> str:
    segments = name.split(".")
    if any(segment.endswith("norm") for segment in segments):
        return "norms"
    if "lm_head" in segments:
        return "head"
    found = [PARTS[segment] for segment in segments if segment in PARTS]
    return found[0] if found else "embedding" if any(segment.startswith("embed_") for segment in segments) else "other"


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    *inputs: Tensor,
    kind: str = "self_attn",
    stack: str | None = None,
    **options: Any,
) -> list[Float[Tensor, "B H T S"]]:
    """Each layer's attention weights on `inputs`, first layer first: how much query i reads from key j.

    `inputs` and `options` are what the model takes: tokens, or for an encoder-decoder source and tokens, and masks.
    `kind` is "self_attn", or "cross_attn" for what a decoder reads of the source. Of an encoder-decoder, `stack` says
    whose self-attention: "encoder", or "decoder" (the default). Runs the model in eval mode, and leaves it as it was.
    """
    if options.get("cache") is not None:
        raise ValueError("attention_maps reads a text whole: leave cache out, which would be filled twice")
    if isinstance(model, Head) and model.config.kind == "encoder":  # a head may ask the last layer for one query only
        if isinstance(model, MultipleChoice):
            inputs = [x.flatten(0, 1) for x in inputs]
            options = {name: x.flatten(0, 1) for name, x in options.items() if x is not None}
        model = model.body
    attentions = _attentions(model, kind, stack)
    maps: dict[nn.Module, Tensor] = {}

    def record(module: Attention, args: tuple, kwargs: dict) -> None:
        maps[module] = module.weights(*args, **kwargs)

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in attentions]
    training = model.training
    try:
        model.eval()(*inputs, **options)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [maps[module] for module in attentions]


def _attentions(model: nn.Module, kind: str, stack: str | None) -> list[Attention]:
    """The attention layers that are asked for, by the names of the modules that hold them."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: did you mean {nearest(kind, KINDS)}?")
    named = [
        (re.sub(r"(\.base)+$", "", name).split("."), module)  # an adapter around it has it as its `base`
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    stacks = {name for segments, _ in named for name in ("encoder", "decoder") if name in segments}
    if stack is None and stacks:
        stack = "decoder"
    if stack is not None and stack not in stacks:
        there = " and ".join(sorted(stacks)) or "only one stack: leave stack out"
        raise ValueError(f"stack={stack!r}: this {type(model).__name__} has {there}")
    found = [module for segments, module in named if segments[-1] == kind and (stack is None or stack in segments)]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no {kind} in its {stack or 'layers'}")
    return found
