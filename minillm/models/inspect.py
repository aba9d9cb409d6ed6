"""Looking into a model: where its parameters are, and what its attention heads look at."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.layers import Attention

PARTS = {"self_attn": "attention", "cross_attn": "attention", "mlp": "mlp", "lm_head": "head"}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part: embedding, attention, mlp, norms, head, other, and their total.

    A shared tensor counts once, where it is named first: a tied head counts as embedding.
    """
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "other"), 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def _part(name: str) -> str:
    segments = name.split(".")
    if any(segment.endswith("norm") for segment in segments):
        return "norms"
    found = [PARTS[segment] for segment in segments if segment in PARTS]
    return "embedding" if name.startswith("embed") else found[0] if found else "other"


@torch.no_grad()
def attention_maps(model: nn.Module, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B H T T"]]:
    """Each layer's self-attention weights on `tokens`: how much query i reads from key j, first layer first."""
    maps = []

    def record(module: Attention, args: tuple, kwargs: dict) -> None:
        maps.append(module.weights(*args, **kwargs))

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in attentions]
    training = model.training
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return maps
