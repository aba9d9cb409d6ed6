"""Key/value caches: what attention has already computed for earlier positions, passed from step to step by the caller.

One cache per layer. The cache is an argument of the model, so a *learned* cache (prefix tuning, Li & Liang 2021,
arXiv:2101.00190) enters by the same door as generation does.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


class MemoryCache:
    """Keys and values of what cross-attention reads, an encoder's output: computed once, read at every step."""

    def __init__(self):
        self.keys: Tensor | None = None  # (B, G, S, K)
        self.values: Tensor | None = None
        self.mask: Tensor | None = None  # (B, 1, 1, S), True at real positions; None if all are
        self.prefix: tuple[Tensor, Tensor] | None = None  # learned keys and values, (1, G, P, K) each
        self.owners: tuple[object, ...] = ()  # of the learned ones

    @property
    def filled(self) -> bool:
        """Whether the source has been read."""
        return self.keys is not None

    def prepend(self, owner: object, k: Float[Tensor, "1 G P K"], v: Float[Tensor, "1 G P K"]) -> None:
        """As KVCache.prepend; the prefix will stand before the source."""
        if self.filled:
            raise ValueError(_too_late("a source was read"))
        self.prefix = (k, v) if self.prefix is None else (_join(k, self.prefix[0]), _join(v, self.prefix[1]))
        self.owners = (*self.owners, owner)

    def fill(self, k: Float[Tensor, "B G S K"], v: Float[Tensor, "B G S K"], mask: Tensor | None) -> None:
        """Keep the source's keys, values and mask."""
        if self.prefix is not None:
            k, v = _join(self.prefix[0], k), _join(self.prefix[1], v)
            mask = None if mask is None else pad(mask, (k.shape[2] - mask.shape[-1], 0), value=True)
        self.keys, self.values, self.mask = k, v, mask

    def reorder(self, rows: Int[Tensor, " N"]) -> None:
        """As KVCache.reorder."""
        if self.keys is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            if self.mask is not None and self.mask.shape[0] > 1:
                self.mask = self.mask.index_select(0, rows)


class KVCache:
    """Keys and values of one attention layer; grows with the sequence.

    `offset` counts the tokens cached: it is the position of the next one. A learned `prefix` (keys, values), each
    (1 or B, G, P, K), stands before all tokens but has no position: it counts in `length`, not in `offset`.

    With gradients enabled every update concatenates, so nothing that autograd saved is overwritten and a loss reaches
    the prefix. Without, keys and values are written into a buffer that doubles when full: a concatenation for every
    token would copy all that came before.

    `memory` is the same for the layer's cross-attention, if it has one.
    """

    def __init__(self, prefix: tuple[Float[Tensor, "N G P K"], Float[Tensor, "N G P K"]] | None = None):
        self.offset = 0
        self.memory = MemoryCache()
        self.keys, self.values = prefix if prefix is not None else (None, None)  # (B, G, capacity, K), filled to length
        self.prefix_length = 0 if prefix is None else prefix[0].shape[2]
        self.owners: tuple[object, ...] = ()  # of the prefixes that were put in by `prepend`

    @property
    def length(self) -> int:
        """How many keys a query can meet, S: the prefix and the tokens so far."""
        return self.prefix_length + self.offset

    def prepend(self, owner: object, k: Float[Tensor, "1 G P K"], v: Float[Tensor, "1 G P K"]) -> None:
        """Put a learned prefix before all that is here; afterwards `owner` is among the `owners`.

        Raises ValueError if there are tokens already: they were read without it.
        """
        if self.offset:
            raise ValueError(_too_late(f"{self.offset} tokens were read"))
        self.keys, self.values = (k, v) if self.keys is None else (_join(k, self.keys), _join(v, self.values))
        self.prefix_length += k.shape[2]
        self.owners = (*self.owners, owner)

    def update(
        self, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Append the keys and values of T new positions; return all so far, the prefix first.

        The result may be a view of the cache: read it, do not write into it.
        """
        if self.keys is None:  # nothing to join: one pass over a prompt copies nothing
            self.keys, self.values = k, v
        else:
            self._fit(k)
            if torch.is_grad_enabled():
                self.keys = torch.cat([self._filled(self.keys), k], dim=2)
                self.values = torch.cat([self._filled(self.values), v], dim=2)
            else:
                self._write(k, v)
        self.offset += k.shape[2]
        return self._filled(self.keys), self._filled(self.values)

    def reorder(self, rows: Int[Tensor, " N"]) -> None:
        """Row i of the batch goes on with what row `rows[i]` was: for beam search, or to drop finished rows."""
        if self.keys is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.memory.reorder(rows)

    def _filled(self, buffer: Tensor) -> Tensor:
        return buffer.narrow(2, 0, self.length)

    def _write(self, k: Tensor, v: Tensor) -> None:
        needed = self.length + k.shape[2]
        if needed > self.keys.shape[2]:  # full; this also replaces tensors that belong to the caller before writing
            self.keys, self.values = self._grown(self.keys, 2 * needed), self._grown(self.values, 2 * needed)
        self.keys.narrow(2, self.length, k.shape[2]).copy_(k)
        self.values.narrow(2, self.length, k.shape[2]).copy_(v)

    def _grown(self, buffer: Tensor, capacity: int) -> Tensor:
        batch_size, num_kv_heads, _, head_dim = buffer.shape
        grown = buffer.new_empty(batch_size, num_kv_heads, capacity, head_dim)
        grown.narrow(2, 0, self.length).copy_(self._filled(buffer))
        return grown

    def _fit(self, k: Tensor) -> None:
        """Give an untouched prefix the batch size and dtype of the first keys; afterwards they must not change."""
        if self.offset == 0 and self.prefix_length:
            rows = k.shape[0] if self.keys.shape[0] == 1 else -1
            self.keys = self.keys.to(k.dtype).expand(rows, -1, -1, -1)  # autocast gives k a lower precision
            self.values = self.values.to(k.dtype).expand(rows, -1, -1, -1)
        (batch, heads, _, features), (new_batch, new_heads, _, new_features) = self.keys.shape, k.shape
        if (batch, heads, features, self.keys.dtype) != (new_batch, new_heads, new_features, k.dtype):
            raise ValueError(
                "the cache does not fit the new keys:\n"
                f"  cached: batch {batch}, key/value heads {heads}, features {features}, {self.keys.dtype}\n"
                f"  given:  batch {new_batch}, key/value heads {new_heads}, features {new_features}, {k.dtype}\n"
                "use one cache per layer and new ones for every batch, and reorder() them when rows change"
            )


def _join(prefix: Tensor, keys: Tensor) -> Tensor:
    """`keys` behind a prefix that takes their batch size and dtype."""
    return torch.cat([prefix.to(keys.dtype).expand(len(keys), -1, -1, -1), keys], dim=2)


def _too_late(what: str) -> str:
    return f"this cache cannot take a learned prefix: {what} without it; use new caches for every text"


class StaticKVCache(KVCache):
    """A KVCache of fixed capacity, allocated once: no growth and the same memory from the first token to the last.

    For generation only: it always writes in place, which autograd forbids. `max_length` counts prompt and new tokens;
    a learned prefix brings its own room.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.keys = torch.zeros(batch_size, num_kv_heads, max_length, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def update(
        self, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """As KVCache.update. Raises ValueError when the capacity is exceeded or a gradient would have to pass."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("StaticKVCache writes in place, so no gradient can pass: use torch.no_grad() or a KVCache")
        self._fit(k)
        capacity = self.keys.shape[2]
        if self.length + k.shape[2] > capacity:
            raise ValueError(
                f"StaticKVCache is full: {self.length} of {capacity} positions are used and {k.shape[2]} more are "
                f"asked for; make it with max_length >= {self.length + k.shape[2]}, or use a KVCache, which grows"
            )
        self._write(k, v)
        self.offset += k.shape[2]
        return self._filled(self.keys), self._filled(self.values)
