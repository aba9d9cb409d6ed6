"""Token by token: the prompt in one pass, then one cached step for each new token."""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from minillm.generation.checks import raise_if, wrong_input
from minillm.generation.decode_mode import DecodeMode
from minillm.generation.filters import LogitsFilter, apply_filters
from minillm.generation.next_logits import CausalModel, NextLogits
from minillm.generation.sampling import Sampler, greedy
from minillm.layers import KVCache, StaticKVCache
from minillm.peft.doors import positions_taken


def generate(
    model: CausalModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    filters: Sequence[LogitsFilter] = (),
    stop_ids: Collection[int] = (),
    mask: Tensor | None = None,
    pad_id: int = 0,
    cache: list[KVCache] | None = None,
) -> Iterator[Tensor]:
    """Continue each row of tokens (B, T); yields the new ids (B,) step by step.

    `model`: a decoder, or an encoder-decoder whose source is fixed, `model.condition(source, source_mask)`; `tokens`
    are then what its decoder starts with, usually `config.decoder_start_id` alone.
    A row ends with the first of `stop_ids`, which is still yielded; afterwards it yields `pad_id`, and when all rows
    have ended, so has the iterator. Rows of unequal length are padded on the left, `mask` (B, T) bool is True at real
    tokens; every row then gets what it would get alone.
    `filters` act on the logits before the sampler does (see `filters.py`).
    `cache`: one per layer, for caches that hold a learned prefix or are static (`static_cache`); new KVCaches
    unless given.

    The weights must not change before the last step: some are kept in another layout meanwhile.
    The model computes in eval mode and without gradients; each module is left in the mode it was in.
    Raises ValueError at once for input that cannot work, and during generation when logits are not finite or filters
    leave no token.
    """
    raise_if(wrong_input(model, tokens, max_new_tokens, stop_ids, mask))
    steps = _steps(model, tokens, max_new_tokens, sampler, filters, mask, cache)
    return _ended(steps, torch.tensor(sorted(stop_ids), device=tokens.device), pad_id) if stop_ids else steps


def generate_tokens(model: CausalModel, tokens: Tensor, **options) -> Tensor:
    """All new ids of `generate` (same arguments) at once: (B, number of steps)."""
    return torch.stack(list(generate(model, tokens, **options)), dim=1)


def static_cache(model: CausalModel, batch_size: int, max_length: int) -> list[StaticKVCache]:
    """Caches for `generate` with room for max_length = prompt + new tokens (and a trained prompt), allocated at once.

    With memory that never moves the model can be compiled: `model.hidden = torch.compile(model.hidden)`. For the tiny
    Llama of `benchmarks/decode.py` that takes a minute once and then a quarter off the time of every token.
    """
    c, weight = model.config, model.embed_tokens.weight
    max_length += positions_taken(model)
    return [
        StaticKVCache(batch_size, c.num_kv_heads, max_length, c.head_dim, weight.dtype, weight.device)
        for _ in model.layers
    ]


def _steps(
    model: CausalModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    filters: Sequence[LogitsFilter],
    mask: Tensor | None,
    cache: list[KVCache] | None,
) -> Iterator[Tensor]:
    next_logits = NextLogits(model, mask, max_new_tokens, cache)
    so_far = tokens if mask is None else tokens.masked_fill(~mask, -1)  # (B, T), what the filters see
    mode = DecodeMode(model, rows=len(tokens), prepare=max_new_tokens >= 8)  # a copy costs what 4 steps gain
    for num_new in range(max_new_tokens):
        with mode:
            logits = next_logits(tokens)
            ids = sampler(_filtered(filters, logits, so_far, num_new) if filters else logits)
        ids = ids.clone()  # outside inference mode: a tensor the caller may also train on
        yield ids
        tokens = ids[:, None]
        if filters:
            so_far = torch.cat([so_far, tokens], dim=1)


def _filtered(filters: Sequence[LogitsFilter], logits: Tensor, so_far: Tensor, num_new: int) -> Tensor:
    logits = apply_filters(filters, logits, so_far, num_new)
    if empty := (logits == -math.inf).all(-1).nonzero().flatten().tolist():
        raise ValueError(
            f"the filters leave no token for row(s) {empty} after {num_new} new ones: generate less, or forbid less"
        )
    return logits


def _ended(steps: Iterator[Tensor], stop_ids: Tensor, pad_id: int) -> Iterator[Tensor]:
    """The same ids until each row's first stop id, then `pad_id`."""
    ended: Tensor | bool = False
    for ids in steps:
        ids = ids.masked_fill(ended, pad_id) if isinstance(ended, Tensor) else ids
        ended = torch.isin(ids, stop_ids) | ended
        yield ids
        if ended.all():
            return
