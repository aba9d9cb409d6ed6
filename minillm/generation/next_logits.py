"""One step of generation: tokens in, logits of the next token out; the cache keeps what was computed before."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from minillm.generation.nonfinite import first_nonfinite
from minillm.layers import KVCache, MemoryCache


class CausalModel(Protocol):
    """What generation asks of a module: a Decoder has it, a RecurrentLM, and what `condition` returns."""

    config: Any  # with vocab_size and max_positions
    layers: nn.ModuleList
    embed_tokens: nn.Embedding
    lm_head: nn.Module

    def hidden(self, tokens: Tensor, *, mask: Any = None, positions: Any = None, cache: Any = None) -> Tensor:
        """(B, T) token ids -> (B, T, D), what the head reads."""


@runtime_checkable
class Seq2Seq(Protocol):
    """An encoder-decoder: with its source fixed it is a causal model of the target."""

    def condition(self, source: Tensor, source_mask: Tensor | None = None) -> CausalModel:
        """`source` (B, S) ids, `source_mask` (B, S) bool, True at real ones."""


class NextLogits:
    """Call it with the prompt (B, T), then with each new token (B, 1): float32 logits (B, V) of the token after.

    It keeps the cache, the padding mask and the positions in step, so that a search deals with tokens only.
    `mask` (B, T) is that of the prompt; the tokens after it, at most `max_new_tokens`, are all real.
    """

    def __init__(self, model: CausalModel, mask: Tensor | None, max_new_tokens: int, cache: list[KVCache] | None):
        self.model, self.length = model, 0
        self.cache = [KVCache() for _ in model.layers] if cache is None else cache
        self.mask, self.positions = mask, None
        if mask is not None:
            self.mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
            self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Raises ValueError if logits are not finite, naming the rows and the module that broke first."""
        self.length += tokens.shape[1]
        mask = None if self.mask is None else self.mask[:, : self.length]
        before, source_was_read = self.cache[0].offset, self.cache[0].memory.filled

        def run() -> Tensor:
            hidden = self.model.hidden(tokens, mask=mask, positions=self.positions, cache=self.cache)
            return self.model.lm_head(hidden[:, -1]).float()  # the head is not computed for the other positions

        logits = run()
        if not math.isfinite(logits.sum()) and not logits.isfinite().all():
            rows = (~logits.isfinite()).any(-1).nonzero().flatten().tolist()
            for layer_cache in self.cache:  # forget this step, so that it can be run again
                layer_cache.offset = before
                layer_cache.memory = layer_cache.memory if source_was_read else MemoryCache()
            raise ValueError(f"logits of row(s) {rows} are not finite, {first_nonfinite(self.model, run)}")
        self.positions = None if self.positions is None else self.positions[:, -1:] + 1
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on with what row `rows[i]` was: a continuation of the same prompt, or of the same source.

        Copies no more than it must: nothing if every row stays where it is, and no source's keys if as many rows go on
        as were, because each stands where one of its own prompt stood.
        """
        before = self.cache[0].keys.shape[0]
        if torch.equal(rows, torch.arange(before, device=rows.device)):
            return
        for layer_cache in self.cache:
            memory = layer_cache.memory
            layer_cache.memory = MemoryCache() if len(rows) == before else memory  # an empty one costs nothing
            layer_cache.reorder(rows)
            layer_cache.memory = memory
        if self.mask is not None and len(rows) != before:
            self.mask, self.positions = self.mask[rows], self.positions[rows]
