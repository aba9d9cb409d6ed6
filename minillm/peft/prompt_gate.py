"""The gate through which trained vectors come before a text."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.peft.doors import Door, entrances
from minillm.peft.linears import adapter_dtype
from minillm.peft.names import Gate, Wrapper


class Layout:
    """Where prompt and text stand in each row: the prompt right before the row's first real token.

    So padding on the left stands before both, and a row is what it would be alone also where distances are counted in
    memory (relative positions, sliding windows). Without a mask, or with one for each query, the prompt is first.
    """

    def __init__(self, length: int, mask: Tensor | None):
        self.order, self.shift = None, length
        if mask is not None and mask.dim() == 2:
            first = mask.int().argmax(1, keepdim=True)  # (B, 1)
            text = torch.arange(mask.shape[1], device=mask.device)
            self.shift = length * (text >= first)  # (B, S), by how much each token moves
            prompt = first + torch.arange(length, device=mask.device)
            self.order = torch.cat([prompt, text + self.shift], dim=1).argsort(1)  # (B, P + S), who stands there

    def join(self, prompt: Tensor, text: Tensor) -> Tensor:
        """(B, P, ..) and (B, S, ..) to (B, P + S, ..)."""
        both = torch.cat([prompt, text], dim=1)
        if self.order is None:
            return both
        starts = both.shape[1] * torch.arange(len(both), device=both.device)  # whole rows move, which is cheap
        return both.flatten(0, 1).index_select(0, (starts[:, None] + self.order).flatten()).view_as(both)

    def moved(self, positions: Tensor) -> Tensor:
        """Positions of the newest tokens, (T) or (B, T), moved with them."""
        return positions + (self.shift if self.order is None else self.shift[:, -positions.shape[-1] :])


class PromptGate(Gate):
    """Leads what enters a model past `embeddings` (P, D): the model reads them before the text.

    What comes out are the hidden states of the text alone, so labels, poolers and spans mean what they meant before. An
    encoder-decoder gets its prompt before the source, and its decoder reads the prompt's states too (`encode` alone
    passes by the prompt). Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
    With a KV cache the first call puts the prompt in, and the cache holds it from then on. The prompt has the positions
    0..P-1 and the text those from P on, counted as the model counts: given positions are moved by P.
    The values are what the model adds positions to, after it has scaled its embeddings, if it does.
    """

    leaf = "prompt"

    def __init__(self, body: nn.Module, length: int, device: torch.device | str):
        super().__init__()
        table = embedding(body)
        self.length, self.max_positions = length, body.config.max_positions
        self.before_source = entry(body) == "source_embeds"
        self.positions = 0 if self.before_source else length
        scaled = getattr(body.config, "scale_embeddings", False)  # recurrent models know no such thing
        self.scale = math.sqrt(table.embedding_dim) if scaled else 1.0
        self.embeddings = nn.Parameter(
            torch.empty(length, table.embedding_dim, dtype=adapter_dtype(table), device=device)
        )

    def forward(self) -> Tensor:
        """The vectors that the model reads, (P, D)."""
        return self.embeddings

    def extra_repr(self) -> str:
        return f"length={self.length}"

    def hidden(self, call: Door, *args: Any, **options: Any) -> Tensor:
        return (self._source if self.before_source else self._text)(call, *args, **options)

    def _source(
        self, call: Door, source=None, tokens=None, *, source_embeds=None, source_mask=None, cache=None, **rest
    ):
        rest |= {"cache": cache}
        read = cache and cache[0].memory.filled
        if read or (source is None) == (source_embeds is None):  # the model says what is wrong with both or neither
            return call(source, tokens, source_embeds=source_embeds, source_mask=source_mask, **rest)
        x = self._look_up(call, source) if source_embeds is None else source_embeds
        self._check(0, x.shape[1], source_mask)
        layout = Layout(self.length, source_mask)
        joined = layout.join(self._rows(x), x)
        return call(None, tokens, source_embeds=joined, source_mask=self._mask(layout, source_mask), **rest)

    def _text(
        self,
        call: Door,
        tokens=None,
        *,
        embeds=None,
        mask=None,
        positions=None,
        token_types=None,
        at=None,
        cache=None,
        **rest,
    ):
        if (tokens is None) == (embeds is None):
            return call(tokens, embeds=embeds)  # says what is wrong
        cached, length = cache[0].offset if cache else 0, (tokens if embeds is None else embeds).shape[1]
        self._check(cached, length, mask, caches=cache is not None)
        layout = Layout(self.length, mask)
        rest |= {"mask": self._mask(layout, mask), "positions": None if positions is None else layout.moved(positions)}
        rest |= {} if cache is None else {"cache": cache}
        if cached:
            return call(tokens, embeds=embeds, **rest)
        x = self._look_up(call, tokens) if embeds is None else embeds
        if positions is not None:
            own = torch.arange(self.length, device=x.device)
            rest["positions"] = layout.join(own.expand(len(x), -1), rest["positions"].expand(len(x), -1))
        if token_types is not None:
            rest["token_types"] = layout.join(token_types.new_zeros(len(x), self.length), token_types)
        rest |= {} if at is None else {"at": at + self.length}
        states = call(None, embeds=layout.join(self._rows(x), x), **rest)
        return states if at is not None else states[:, self.length :]  # only padding on the left did not move by P

    def _look_up(self, call: Door, tokens: Tensor) -> Tensor:
        try:
            return call.model.embed_tokens(tokens)
        except IndexError:
            call(*[tokens] * (1 + self.before_source))  # the model says which id is none of its own
            raise

    def _rows(self, x: Tensor) -> Tensor:
        vectors = self() if self.scale == 1.0 else self() / self.scale
        return vectors.to(x.dtype).expand(len(x), -1, -1)

    def _mask(self, layout: Layout, mask: Tensor | None) -> Tensor | None:
        """The prompt is real. Where each query has a mask of its own, all see the prompt and it sees itself alone.

        For such masks keep texts apart that share a row, and a prompt that read them all would carry one to the other.
        """
        if mask is None or mask.dim() == 2:
            return None if mask is None else layout.join(mask.new_ones(len(mask), self.length), mask)
        itself = torch.arange(self.length + mask.shape[2], device=mask.device) < self.length
        queries = itself.expand(len(mask), self.length, -1)
        return torch.cat([queries, F.pad(mask, (self.length, 0), value=True)], dim=1)

    def _check(self, cached: int, length: int, mask: Tensor | None, caches: bool = False) -> None:
        """`cached` counts all that is in the cache: this prompt, and others under it."""
        text = max(cached - self.length, 0) + length
        if self.length + text > self.max_positions:
            raise ValueError(
                f"a prompt of P={self.length} and a text of T={text} make {self.length + text} positions, but the "
                f"model has max_positions={self.max_positions}: cut the text to {self.max_positions - self.length}, or "
                "tune a shorter prompt"
            )
        if 0 < cached < self.length:
            raise ValueError(f"the cache holds {cached} positions and no prompt of {self.length}: use a new one")
        if mask is None:
            return
        if not cached and mask.shape[-1] != length:
            raise ValueError(f"mask speaks of {mask.shape[-1]} positions, but there are 0 cached and {length} new ones")
        if cached and mask.dim() == 3:
            raise ValueError("with a prompt and a filled cache, mask must be (B, S): the same for every query")
        first = caches and not cached and mask.dim() == 2
        if first and (empty := (~mask.any(1)).nonzero().flatten().tolist()):
            raise ValueError(f"row(s) {empty} have no real token yet, so their prompt has no place in the cache")


def entry(body: nn.Module) -> str | None:
    """The argument of `hidden` by which embeddings enter: "source_embeds", "embeds", or None."""
    taken = inspect.signature(body.hidden).parameters if entrances(body) else {}
    return next((name for name in ("source_embeds", "embeds") if name in taken), None)


def embedding(body: nn.Module) -> nn.Embedding:
    """The embedding below what may be wrapped around it."""
    table = body.embed_tokens
    while isinstance(table, Wrapper):
        table = table.base
    return table
