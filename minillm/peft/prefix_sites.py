"""Where a prefix can enter a model, and what the model itself would compute there for given tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.layers import Attention, KVCache, MemoryCache
from minillm.peft.doors import entrances
from minillm.peft.linears import device_of
from minillm.peft.names import base_modules


class Site(NamedTuple):
    """An attention that can have a prefix."""

    name: str
    attention: Attention
    config: Any  # of the model

    @property
    def kind(self) -> str:
        """self_attn or cross_attn."""
        return self.name.rpartition(".")[2]

    @property
    def stack(self) -> str:
        """The name of the encoder or decoder that it is in."""
        return f".{self.name}".partition(".layers.")[0][1:]

    @property
    def part(self) -> str:
        """The word for it in a config's `parts`."""
        if self.kind == "cross_attn":
            return "cross"
        return self.stack.rpartition(".")[2] if self.config.kind == "encoder_decoder" else self.config.kind

    @property
    def num_features(self) -> int:
        """G K, of its keys and of its values."""
        return self.config.num_kv_heads * self.config.head_dim


def sites_of(model: nn.Module) -> list[Site]:
    """Every attention of one of our models, in the order of the layers; of other libraries' there is none."""
    return [
        Site(name, module, body.config)
        for _, body in entrances(model)
        for name, _, module in base_modules(model)
        if isinstance(module, Attention)
    ]


@torch.no_grad()
def computed(model: nn.Module, names: list[str], tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """The keys and values (P, 2 G K) that each attention in `names` computes for these tokens."""
    caches = {name: MemoryCache() if name.endswith("cross_attn") else KVCache() for name in names}
    hooks, training = [], [module for module in model.modules() if module.training]
    for name, outermost, _ in base_modules(model):
        if name in caches:
            hooks.append(
                outermost.register_forward_pre_hook(
                    lambda _, args, options, cache=caches[name]: (args, options | {"cache": cache}), with_kwargs=True
                )
            )
    ((_, body),) = entrances(model)
    ids = torch.tensor([tokens], device=device_of(body))
    try:
        model.eval()
        body.hidden(*[ids] * (1 + (body.config.kind == "encoder_decoder")))
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    P = len(tokens)
    return {
        name: torch.stack([cache.keys[0, :, -P:], cache.values[0, :, -P:]]).permute(2, 0, 1, 3).flatten(1)
        for name, cache in caches.items()
    }
