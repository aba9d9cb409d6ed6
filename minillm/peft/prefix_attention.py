"""Learned keys and values before those of a text, as modules: attention with a prefix, and what goes with it.

Source: Li & Liang 2021 (arXiv:2101.00190), section 4. The model knows nothing of it: its attention takes a cache, and
a prefix is a cache that was learned instead of computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers import KVCache, MemoryCache
from minillm.peft.doors import Door, gates
from minillm.peft.names import Gate, Wrapper

START_STD = 0.02  # of a random prefix


class PrefixNetwork(nn.Module):
    """tanh(E W^T + b), (P, projection_size): what the prefix of every layer is computed from while it is trained.

    A prefix learned through it depends less on the learning rate and start; afterwards only its values are needed.
    Source: Li & Liang 2021, section 4.3. E has as many features as a layer's keys, which is peft's choice.
    """

    def __init__(self, length: int, num_features: int, projection_size: int, **like: Any):
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(length, num_features, **like))
        self.down = nn.Linear(num_features, projection_size, **like)

    def forward(self) -> Tensor:
        return self.down(self.embeddings).tanh()


class PrefixAttention(Wrapper):
    """`base`, an attention, with P learned keys and values that every query sees before those of the text.

    They are `prefix`, (P, 2 G K): the keys of all G heads, then the values; with a `network` they are a linear layer's
    reading of it. They pass no norm and no rotation.
    With `gated_heads` = H a softmax of their own reads them, and each head adds tanh of its gate times what it read: a
    gate of 0 leaves the base as it was, and trains (Zhang et al. 2023, arXiv:2303.16199, section 3.2).
    """

    def __init__(
        self,
        base: nn.Module,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        network: PrefixNetwork | None = None,
        gated_heads: int = 0,
        dropout: float = 0.0,
        cross: bool = False,
        **like: Any,
    ):
        super().__init__()
        self.base, self.length, self.num_kv_heads, self.dropout, self.cross = base, length, num_kv_heads, dropout, cross
        size = 2 * num_kv_heads * head_dim
        self.network = (network,)  # no part of this layer, which only reads it: a tuple hides it from torch
        if network is None:
            self.prefix = nn.Parameter(torch.empty(length, size, **like).normal_(std=START_STD))
        else:
            self.prefix = nn.Linear(network.down.out_features, size, **like)
        self.gates = nn.Parameter(torch.zeros(gated_heads, **like)) if gated_heads else None

    def forward(self, x: Tensor, *, cache: KVCache | MemoryCache | None = None, **options: Any) -> Tensor:
        if self.gates is not None:
            read = (*self.keys_and_values(), self.gates.tanh()[:, None, None])
            return self.base(x, cache=cache, beside=(*options.pop("beside", ()), read), **options)
        if cache is None:  # a new one for each call: gradient checkpointing makes two
            cache = MemoryCache() if self.cross else KVCache()
        if self not in cache.owners:
            cache.prepend(self, *self.keys_and_values())
        return self.base(x, cache=cache, **options)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The prefix, (1, G, P, K) each."""
        flat = F.dropout(self.flat(), self.dropout, self.training)
        keys, values = flat.unflatten(-1, (2, 1, self.num_kv_heads, -1)).permute(1, 2, 3, 0, 4)
        return keys, values

    def flat(self) -> Tensor:
        """The prefix, (P, 2 G K)."""
        (network,) = self.network
        return self.prefix if network is None else self.prefix(network())

    @torch.no_grad()
    def set_flat(self, flat: Tensor) -> None:
        """Let the prefix be `flat` (P, 2 G K); through a network as nearly as its weights for this layer can."""
        (network,) = self.network
        if network is None:
            self.prefix.copy_(flat)
        else:  # exactly, if the network gives P rows that do not depend on each other: projection_size >= P
            wanted = (flat - self.prefix.bias).double()
            self.prefix.weight.copy_((network().double().pinverse() @ wanted).mT)

    def extra_repr(self) -> str:
        words = {f"length={self.length}": True, "cross": self.cross, "gated": self.gates is not None}
        return ", ".join(word for word, on in words.items() if on)


class PrefixPositions(Wrapper):
    """Relative positions of a text that begins behind P keys, which come first and get biases, too.

    `first` (B, 1) is each row's first real token, if the gate knows: in a row that is padded on the left the distance
    to the prefix is what it would be without padding.
    """

    def __init__(self, base: nn.Module, length: int):
        super().__init__()
        self.base, self.length = base, length
        self.first: Tensor | None = None

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        bias = self.base(num_queries, num_keys + self.length)  # (1 or B, H, T, S)
        if self.first is None:
            return bias
        start = bias.shape[-1] - num_keys - self.length  # of this prefix: those of earlier adapters stand before it
        columns = self.first + torch.arange(start, start + self.length, device=bias.device)  # (B, P)
        bias = bias.expand(len(columns), -1, -1, -1)
        prefix = bias.take_along_dim(columns[:, None, None], dim=-1)
        return torch.cat([bias[..., :start], prefix, bias[..., start + self.length :]], dim=-1)


class PrefixGate(Gate):
    """Before a stack: its text begins at position P, as if P tokens stood before it. It also holds the networks."""

    leaf = "prefix"

    def __init__(
        self,
        length: int,
        max_positions: int,
        networks: dict[str, PrefixNetwork],
        relative: Sequence[PrefixPositions] = (),
    ):
        super().__init__()
        self.positions, self.max_positions, self.relative = length, max_positions, tuple(relative)
        for name, network in networks.items():
            self.add_module(name, network)

    def drop_networks(self) -> None:
        """Forget the networks, which nobody reads any more."""
        self._modules.clear()

    def hidden(self, call: Door, tokens: Tensor | None = None, **options: Any) -> Tensor:
        text = options.get("embeds") if tokens is None else tokens
        if not self.positions or text is None:  # the stack says what is wrong without a text
            return call(tokens, **options)
        offset, below = cache[0].offset if (cache := options.get("cache")) else 0, gates(call.model)[: call.depth]
        if offset:  # what other gates put before the text is in the cache, too
            offset -= sum(gate.positions for gate in below if not isinstance(gate, PrefixGate))
        self._check(offset + text.shape[1], sum(gate.positions for gate in below) + self.positions)
        options["positions"] = self.positions + _positions(text, offset, **options)
        mask = options.get("mask")
        for relative in self.relative:
            relative.first = mask.int().argmax(1, keepdim=True) if mask is not None and mask.dim() == 2 else None
        return call(tokens, **options)

    def _check(self, length: int, prefix: int) -> None:
        if length + prefix > self.max_positions:
            raise ValueError(
                f"a prefix of P={prefix} and a text of T={length} make {length + prefix} positions, but the model has "
                f"max_positions={self.max_positions}: cut the text to {self.max_positions - prefix}, or tune a shorter "
                "prefix"
            )


def _positions(
    text: Tensor, offset: int, *, mask: Tensor | None = None, positions: Tensor | None = None, **_: Any
) -> Tensor:
    """Where the stack would see the text: real tokens count from 0."""
    if positions is not None:
        return positions
    length = text.shape[1]
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(offset, offset + length, device=text.device)
