"""Multi-head attention: self or cross, with fewer key/value heads if wanted, with a cache if given."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from minillm import ops
from minillm.layers.cache import KVCache, MemoryCache

Rotation = tuple[Tensor, Tensor]  # cosines and sines of `ops.rotary_table`
Beside = tuple[Tensor, Tensor, Tensor]  # keys and values (1, G, P, K), and how much each head reads of them (H, 1, 1)


class Attention(nn.Module):
    """Queries from x read from `source` (x itself unless given), each head in its own features.

    `num_kv_heads` = `num_heads` is multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), 1 is multi-query
    (Shazeer 2019, arXiv:1911.02150), between them grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).
    The projections stay separate modules, so that each can be adapted, quantised or frozen by its name.
    `bias="qkv"` gives the output projection none (Qwen 2). `qk_norm` makes a norm over the K features that queries and
    keys pass before they meet, so that no score grows without bound (Henry et al. 2020, arXiv:2010.04245; Qwen 3).
    `scale` on the scores is 1/sqrt(K) unless given; T5 has 1 and smaller weights instead.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool | Literal["qkv"] = False,
        dropout: float = 0.0,
        scale: float | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}; or give head_dim")
        self.head_dim = head_dim or hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bool(bias))
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bool(bias))
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bool(bias))
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias is True)
        self.q_norm, self.k_norm = (qk_norm(self.head_dim), qk_norm(self.head_dim)) if qk_norm else (None, None)
        self.dropout, self.scale = dropout, scale

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        source: Float[Tensor, "B S0 D"] | None = None,
        mask: Bool[Tensor, "#B #H #T S1"] | None = None,
        causal: bool = False,
        window: int = 0,
        rotation: Rotation | None = None,
        bias: Float[Tensor, "#B #H #T S2"] | None = None,
        cache: KVCache | MemoryCache | None = None,
        beside: Sequence[Beside] = (),
    ) -> Float[Tensor, "B T D"]:
        """Attend and project back to D features.

        `mask` (True = may see) and `bias` (added to the scores) speak of all tokens, cached ones included. A learned
        prefix in the cache is seen by all, with no bias, unless they speak of it, too.
        `causal`: a query sees no later position, and with a `window` only the newest so many, its own among them.
        `rotation`: cosines and sines that turn queries and keys. `cache` keeps this call's keys and values; a
        MemoryCache keeps those of `source` with its mask, and once filled it stands for both.
        `beside`: further keys and values, each read by a softmax of their own and added.
        """
        q, k, v, seen = self._project(x, source, mask, causal, window, rotation, bias, cache)
        dropout = self.dropout if self.training else 0.0
        y = ops.attention(q, k, v, **seen, scale=self.scale, dropout=dropout)
        for keys, values, share in beside:
            k, v = (x.to(q.dtype).expand(len(q), -1, -1, -1) for x in (keys, values))
            y = y + share.to(y.dtype) * ops.attention(q, k, v, scale=self.scale, dropout=dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def weights(
        self, x, *, source=None, mask=None, causal=False, window=0, rotation=None, bias=None, cache=None, beside=()
    ) -> Float[Tensor, "B H T S"]:
        """The attention weights of that call of `forward`, for looking at: without those of `beside`.

        A `cache` is left as it is, so that the call itself can follow.
        """
        q, k, _, seen = self._project(x, source, mask, causal, window, rotation, bias, copy.copy(cache))
        return ops.attention_weights(q, k, **seen, scale=self.scale)

    def _project(self, x, source, mask, causal, window, rotation, bias, cache):
        """Queries, keys, values, and what attention is told of who sees whom."""
        q = self._heads(self.q_proj(x), self.q_norm)  # (B, H, T, K)
        if isinstance(cache, MemoryCache) and cache.filled:
            return q, cache.keys, cache.values, {"mask": cache.mask, "causal": causal, "bias": bias}
        source = x if source is None else source
        k, v = self._heads(self.k_proj(source), self.k_norm), self._heads(self.v_proj(source))  # (B, G, S, K)
        if rotation is not None:
            q, k = ops.rope(q, *rotation), ops.rope(k, *rotation)
        tokens, prefix = k.shape[2], 0
        if isinstance(cache, KVCache):
            tokens, prefix = tokens + cache.offset, cache.prefix_length
        for name, told in (("mask", mask), ("bias", bias)):
            if told is not None and told.shape[-1] not in (tokens, prefix + tokens):
                raise ValueError(
                    f"{name} speaks of {told.shape[-1]} keys, but there are {tokens}, cached ones included"
                )
        if isinstance(cache, MemoryCache):
            cache.fill(k, v, mask)
            return q, cache.keys, cache.values, {"mask": cache.mask, "causal": causal, "bias": bias}
        if cache is not None:
            k, v = cache.update(k, v)
        mask, bias = _over_prefix(mask, k.shape[2], True), _over_prefix(bias, k.shape[2], 0.0)
        return q, k, v, {"mask": mask, "causal": causal, "window": window, "prefix": prefix, "bias": bias}

    def _heads(self, projected: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, T, H K) to (B, H, T, K), each head's K features normalised if asked."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)


def _over_prefix(told: Tensor | None, keys: int, value: bool | float) -> Tensor | None:
    """A mask or bias of all keys, with `value` for a prefix that it does not speak of."""
    return told if told is None or told.shape[-1] == keys else pad(told, (keys - told.shape[-1], 0), value=value)
