"""What a text may look like, as filters on logits that also see the tokens so far; for `generate` and `beam_search`.

A `LogitsFilter` is a pure function (logits (B, V), tokens (B, T), num_new) -> logits (B, V). `tokens` are the prompt,
-1 where it is padding, and the `num_new` tokens after it. The filters here are made with their settings:
filters=[no_repeat_ngram(3), min_new_tokens(10, stop_ids)]. They act in the order of the list, before the sampler's.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

LogitsFilter = Callable[[Tensor, Tensor, int], Tensor]


def apply_filters(filters: Sequence[LogitsFilter], logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
    """The logits after every filter in turn."""
    for keep in filters:
        logits = keep(logits, tokens, num_new)
    return logits


def no_repeat_ngram(n: int) -> LogitsFilter:
    """No n tokens in a row come a second time; the prompt counts too.

    Source: Paulus et al. 2017 (arXiv:1705.04304), section 2.5, for n = 3.
    """
    _raise_unless(n >= 1, f"no_repeat_ngram({n}): n must be at least 1")

    def keep(logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
        if tokens.shape[1] < n:
            return logits
        ngrams = tokens.unfold(1, n, 1)  # (B, T - n + 1, n)
        begun = tokens[:, None, tokens.shape[1] - n + 1 :]  # (B, 1, n - 1), what one more token would complete
        rows, at = ((ngrams[..., :-1] == begun).all(-1) & (ngrams[..., -1] >= 0)).nonzero(as_tuple=True)
        repeats = torch.zeros_like(logits, dtype=torch.bool)
        repeats[rows, ngrams[rows, at, -1]] = True
        return logits.masked_fill(repeats, -math.inf)

    return keep


def repetition_penalty(penalty: float) -> LogitsFilter:
    """Tokens that have come before, in the prompt too, lose: positive logits are divided, negative ones multiplied.

    1 changes nothing, 1.2 balances true and new text. Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1.
    """
    _raise_unless(0 < penalty < math.inf, f"repetition_penalty({penalty}): must be a number above 0, usually 1 to 1.5")

    def keep(logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
        rows, at = (tokens >= 0).nonzero(as_tuple=True)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[rows, tokens[rows, at]] = True
        return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    return keep


def known_ids(count: int) -> LogitsFilter:
    """Only the first `count` ids: many models have more rows than their tokenizer has ids."""
    _raise_unless(count >= 1, f"known_ids({count}): must be at least 1")

    def keep(logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= count, -math.inf)

    return keep


def min_new_tokens(at_least: int, stop_ids: Collection[int]) -> LogitsFilter:
    """No stop id comes before there are `at_least` new tokens.

    A Hub config's `min_length` counts the decoder's start token too, so it is min_new_tokens(min_length - 1, ...).
    """
    _raise_unless(at_least >= 0, f"min_new_tokens({at_least}, ...): must be at least 0")

    def keep(logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
        return _fill(logits, stop_ids, -math.inf) if num_new < at_least else logits

    return keep


def forced_first(token: int) -> LogitsFilter:
    """The first new token is this one, such as the language to translate into (mBART-50: Tang et al. 2020,
    arXiv:2008.00401)."""
    return _forced(token, when=0)


def forced_last(token: int, max_new_tokens: int) -> LogitsFilter:
    """A text that would be cut off at `max_new_tokens` ends with this token instead, as BART's summaries do."""
    return _forced(token, when=max_new_tokens - 1)


def _forced(token: int, when: int) -> LogitsFilter:
    def keep(logits: Tensor, tokens: Tensor, num_new: int) -> Tensor:
        # log 1 = 0: in a beam search, what is forced adds nothing to the score
        return _fill(torch.full_like(logits, -math.inf), [token], 0.0) if num_new == when else logits

    return keep


def _fill(logits: Tensor, ids: Collection[int], value: float) -> Tensor:
    outside = sorted(i for i in ids if not 0 <= i < logits.shape[-1])
    _raise_unless(not outside, f"token ids {outside} of a filter are outside the vocabulary 0..{logits.shape[-1] - 1}")
    return logits.index_fill(-1, torch.tensor(sorted(ids), dtype=torch.long, device=logits.device), value)


def _raise_unless(right: bool, message: str) -> None:
    if not right:
        raise ValueError(message)
