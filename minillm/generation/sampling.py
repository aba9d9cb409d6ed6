"""From logits to the next token: filters that compose, and the samplers built of them.

Every filter is a pure function of logits (B, V); what it removes becomes -inf, so that softmax gives it probability 0.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Sampler = Callable[[Tensor], Tensor]  # logits (B, V) -> token ids (B,)


def temperature(logits: Tensor, t: float) -> Tensor:
    """Divide by t: below 1 the likely tokens gain, above 1 the unlikely ones; t -> 0 approaches greedy."""
    _raise_if(_wrong(t, None, None) + (["temperature=0 cannot divide: use greedy"] if t == 0 else []))
    return logits / t


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens, and any that tie with the last of them.

    Source: Fan et al. 2018 (arXiv:1805.04833), section 5.1.
    """
    _raise_if(_wrong(1.0, k, None, vocab_size=logits.shape[-1]))
    least_kept = logits.topk(k).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < least_kept, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p (the "nucleus").

    The most likely token always stays. Source: Holtzman et al. 2019 (arXiv:1904.09751), section 3.1.
    """
    _raise_if(_wrong(1.0, None, p))
    ascending, order = logits.sort()
    tail = ascending.softmax(-1).cumsum(-1)  # probability of a token and all less likely ones; small sums first
    remove = tail <= 1 - p
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -math.inf)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row; the lowest id among equals."""
    return logits.argmax(-1)


def sampler(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    *,
    vocab_size: int | None = None,
) -> Sampler:
    """A function that draws one token per row of logits (B, V), after the filters in this order; None leaves one out.

    `temperature=0` is greedy. `generator` (on the device of the logits) makes the draws repeatable; without one they
    come from torch's global generator. With `vocab_size` given top_k is checked now, otherwise at the first logits.
    ValueError lists every setting that makes no sense.
    """
    _raise_if(_wrong(temperature, top_k, top_p, vocab_size))
    if temperature == 0:
        return greedy
    filters = _filters(temperature, top_k, top_p)

    def sample(logits: Tensor) -> Tensor:
        for keep in filters:
            logits = keep(logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    return sample


def _filters(t: float, k: int | None, p: float | None) -> list[Callable[[Tensor], Tensor]]:
    return [
        *([partial(temperature, t=t)] if t != 1 else []),
        *([partial(top_k, k=k)] if k is not None else []),
        *([partial(top_p, p=p)] if p is not None else []),
    ]


def _wrong(t: float, k: int | None, p: float | None, vocab_size: int | None = None) -> list[str]:
    """Every complaint about the settings; written so that NaN fails each comparison and is complained about."""
    wrong = []
    if not 0 <= t < math.inf:
        wrong.append(f"temperature={t}: must be 0 (greedy) or a positive number, usually 0.5 to 1.5")
    elif 0 < t < 1e-6:
        wrong.append(f"temperature={t}: too small to divide by; use 0 for greedy")
    if k is not None and not (isinstance(k, int) and 1 <= k <= (vocab_size or k)):
        wrong.append(f"top_k={k}: must be a whole number from 1 to {vocab_size or 'the size of the vocabulary'}")
    if p is not None and not 0 < p <= 1:
        wrong.append(f"top_p={p}: is a probability and must be above 0 and at most 1")
    return wrong


def _raise_if(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("sampling cannot work with these settings:\n  " + "\n  ".join(wrong))
