"""Token by token: the prompt in one pass, then one cached step for each new token."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from minillm.generation.decode_mode import DecodeMode
from minillm.generation.nonfinite import first_nonfinite
from minillm.generation.sampling import Sampler, greedy
from minillm.layers import KVCache, StaticKVCache
from minillm.models import Decoder


def generate(
    model: Decoder,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop_ids: Collection[int] = (),
    mask: Tensor | None = None,
    pad_id: int = 0,
    cache: list[KVCache] | None = None,
) -> Iterator[Tensor]:
    """Continue each row of tokens (B, T); yields the new ids (B,) step by step.

    A row ends with the first of `stop_ids`, which is still yielded; afterwards it yields `pad_id`, and when all rows
    have ended, so has the iterator. Rows of unequal length are padded on the left, `mask` (B, T) bool is True at real
    tokens; every row then gets what it would get alone.
    `cache`: one per layer, for caches that hold a learned prefix or are static (`static_cache`); new KVCaches
    unless given.

    The weights must not change before the last step: some are kept in another layout meanwhile.
    The model computes in eval mode and without gradients; each module is left in the mode it was in.
    Raises ValueError at once for input that cannot work, and during generation when logits are not finite.
    """
    _check(model, tokens, max_new_tokens, stop_ids, mask)
    cache = [KVCache() for _ in model.layers] if cache is None else cache
    steps = _steps(model, tokens, max_new_tokens, sampler, mask, cache)
    return _ended(steps, torch.tensor(sorted(stop_ids), device=tokens.device), pad_id) if stop_ids else steps


def generate_tokens(model: Decoder, tokens: Tensor, **options) -> Tensor:
    """All new ids of `generate` (same arguments) at once: (B, number of steps)."""
    return torch.stack(list(generate(model, tokens, **options)), dim=1)


def static_cache(model: Decoder, batch_size: int, max_length: int) -> list[StaticKVCache]:
    """Caches for `generate` with room for max_length = prompt + new tokens, allocated at once.

    With memory that never moves the model can be compiled: `model.hidden = torch.compile(model.hidden)`. For the tiny
    Llama of `benchmarks/decode.py` that takes a minute once and then a quarter off the time of every token.
    """
    c, weight = model.config, model.embed_tokens.weight
    return [
        StaticKVCache(batch_size, c.num_kv_heads, max_length, c.head_dim, weight.dtype, weight.device)
        for _ in model.layers
    ]


def _steps(
    model: Decoder, tokens: Tensor, max_new_tokens: int, sampler: Sampler, mask: Tensor | None, cache: list[KVCache]
) -> Iterator[Tensor]:
    positions = None
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)  # new tokens are all real
    length = 0
    mode = DecodeMode(model, copy_weights=max_new_tokens >= 8)  # the copy costs about what 4 steps gain
    for _ in range(max_new_tokens):
        length += tokens.shape[1]
        with mode:
            logits = _next_logits(model, tokens, None if mask is None else mask[:, :length], positions, cache)
            ids = sampler(logits)
        ids = ids.clone()  # outside inference mode: a tensor the caller may also train on
        yield ids
        tokens = ids[:, None]
        positions = None if positions is None else positions[:, -1:] + 1


def _ended(steps: Iterator[Tensor], stop_ids: Tensor, pad_id: int) -> Iterator[Tensor]:
    """The same ids until each row's first stop id, then `pad_id`."""
    ended: Tensor | bool = False
    for ids in steps:
        ids = ids.masked_fill(ended, pad_id) if isinstance(ended, Tensor) else ids
        ended = torch.isin(ids, stop_ids) | ended
        yield ids
        if ended.all():
            return


def _next_logits(
    model: Decoder, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: list[KVCache]
) -> Tensor:
    """Float32 logits (B, V) after the last position; the head is not computed for the others."""

    def run() -> Tensor:
        hidden = model.hidden(tokens, mask=mask, positions=positions, cache=cache)
        return model.lm_head(hidden[:, -1]).float()

    logits = run()
    if not math.isfinite(logits.sum()) and not logits.isfinite().all():
        rows = (~logits.isfinite()).any(-1).nonzero().flatten().tolist()
        for layer_cache in cache:
            layer_cache.offset -= tokens.shape[1]  # forget this step, so that it can be run again
        raise ValueError(f"logits of row(s) {rows} are not finite, {first_nonfinite(model, run)}")
    return logits


def _check(model: Decoder, tokens: Tensor, max_new_tokens: int, stop_ids: Collection[int], mask: Tensor | None) -> None:
    """Every reason why generation cannot start, in one ValueError."""
    wrong = []
    limit, vocab_size, length = model.config.max_positions, model.config.vocab_size, tokens.shape[-1]
    if max_new_tokens < 1:
        wrong.append(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if tokens.dim() != 2 or tokens.numel() == 0:
        wrong.append(f"tokens have shape {tuple(tokens.shape)}: need (batch, length) with at least one token in each")
    elif length + max_new_tokens > limit:
        wrong.append(
            f"prompt of {length} tokens + max_new_tokens={max_new_tokens} make {length + max_new_tokens}, more than "
            f"the model's max_positions={limit}: "
            + (
                f"shorten the prompt to {limit - max_new_tokens} or max_new_tokens to {limit - length}"
                if length < limit and max_new_tokens < limit
                else "shorten the prompt (keep its end) and generate less, or train a model with more positions"
            )
        )
    outside = sorted({i for i in tokens.unique().tolist() if not 0 <= i < vocab_size})
    if outside:
        wrong.append(
            f"token ids {outside[:10]} are outside the vocabulary 0..{vocab_size - 1}: use the model's tokenizer"
        )
    outside = sorted(i for i in stop_ids if not 0 <= i < vocab_size)
    if outside:
        wrong.append(f"stop_ids {outside} are outside the vocabulary 0..{vocab_size - 1}, so they can never come")
    if mask is not None:
        wrong += _mask_wrong(tokens, mask)
    if wrong:
        raise ValueError("cannot generate:\n  " + "\n  ".join(wrong))


def _mask_wrong(tokens: Tensor, mask: Tensor) -> list[str]:
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        return [f"mask is {mask.dtype} of shape {tuple(mask.shape)}: need torch.bool of shape {tuple(tokens.shape)}"]
    wrong = []
    if empty := (~mask.any(-1)).nonzero().flatten().tolist():
        wrong.append(f"prompts {empty} have no real token: the model needs one to start from")
    if (mask[:, 1:] < mask[:, :-1]).any():
        wrong.append("mask has padding after a real token: pad prompts on the left, so that they all end together")
    return wrong
