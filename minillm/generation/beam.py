"""Beam search: the continuations whose whole probability is greatest, as far as a few beams can see."""

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.generation.checks import raise_if, wrong_input
from minillm.generation.decode_mode import DecodeMode
from minillm.generation.filters import LogitsFilter, apply_filters
from minillm.generation.next_logits import CausalModel, NextLogits
from minillm.layers import KVCache

NOTHING = -1  # stands in a hypothesis's row after its end


class Hypotheses(NamedTuple):
    """n continuations for each row of a batch, best first.

    tokens  (B, n, L)  the new ids: up to and with a stop id, or cut off at max_new_tokens; then pad_id
    scores  (B, n)     sum of the tokens' log-probabilities / number of tokens ** length_penalty
    """

    tokens: Tensor
    scores: Tensor

    def take(self, which: Tensor) -> "Hypotheses":
        """Those with the numbers `which` (B, m) in each row."""
        return Hypotheses(self.tokens.take_along_dim(which[:, :, None], 1), self.scores.gather(1, which))


def beam_search(
    model: CausalModel,
    tokens: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return: int = 1,
    filters: Sequence[LogitsFilter] = (),
    mask: Tensor | None = None,
    pad_id: int = 0,
    cache: list[KVCache] | None = None,
) -> Hypotheses:
    """The `num_return` best continuations of each row of tokens (B, T) that a search with `num_beams` beams finds.

    At each step every beam is extended by every token and the best `num_beams` extensions go on; those among them that
    end with a stop id are finished. A row's search ends as `early_stopping` says, once `num_beams` are finished:
    True: at once. False: when no beam, scored at its present length, beats the worst finished one. "never": when none
    could, even if all further tokens up to max_new_tokens were certain.
    `length_penalty` above 0 favours long continuations, below 0 short ones; at 0 the score is the plain
    log-probability, which favours short ones, too, because each token lowers it.
    `model`, `filters` (here on log-probabilities), `mask`, `cache` and the state of the model as in `generate`.
    One beam is greedy decoding, unless early_stopping is "never".

    Source: Sutskever et al. 2014 (arXiv:1409.3215), section 3.2; stopping: Huang et al. 2017 (arXiv:1809.00069). The
    division by length ** penalty is Wu et al. 2016's (arXiv:1609.08144, section 7) without their constant 5 and
    without coverage. Results are those of transformers' `generate`.
    """
    raise_if(
        wrong_input(model, tokens, max_new_tokens, stop_ids, mask)
        + _wrong_search(num_beams, num_return, length_penalty, early_stopping)
        + _wrong_size(num_beams, model.config.vocab_size, len(set(stop_ids)), max_new_tokens)
    )
    stop = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=tokens.device)
    prompt = tokens if mask is None else tokens.masked_fill(~mask, NOTHING)  # (B, T), what the filters see
    running = _empty(tokens, 1, score=0.0)  # the prompt itself: one beam of probability 1
    finished = _empty(tokens, num_beams, score=-math.inf)  # none yet
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with DecodeMode(model, rows=len(tokens) * num_beams, prepare=max_new_tokens >= 8):
        next_logits = NextLogits(model, mask, max_new_tokens, cache)
        for length in range(1, max_new_tokens + 1):
            log_probs = next_logits(tokens).log_softmax(-1)  # (B * beams, V)
            if filters:
                log_probs = apply_filters(filters, log_probs, _so_far(prompt, running), length - 1)
            candidates, rows = _extend(running, log_probs, num_beams * (1 + len(stop)))
            ends = torch.isin(candidates.tokens[:, :, -1], stop) | (length == max_new_tokens)  # (B, candidates)
            finished = _finish(finished, candidates, ends & ~done[:, None], length**length_penalty)
            kept = candidates.scores.masked_fill(ends, -math.inf).topk(min(num_beams, ends.shape[1]))
            running = Hypotheses(candidates.take(kept.indices).tokens, kept.values)
            horizon = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            done |= _cannot_improve(running, finished, horizon**length_penalty, early_stopping is True)
            if done.all():
                break
            next_logits.reorder(rows.gather(1, kept.indices).flatten())
            tokens = running.tokens[:, :, -1].reshape(-1, 1)
    return _best(finished, num_return, pad_id)


def _empty(prompt: Tensor, count: int, score: float) -> Hypotheses:
    scores = torch.full((len(prompt), count), score, device=prompt.device)
    return Hypotheses(prompt.new_empty(len(prompt), count, 0), scores)


def _so_far(prompt: Tensor, beams: Hypotheses) -> Tensor:
    """Prompt and new tokens of every beam, (B * beams, T + new)."""
    return torch.cat([prompt.repeat_interleave(beams.tokens.shape[1], dim=0), beams.tokens.flatten(0, 1)], dim=1)


def _extend(beams: Hypotheses, log_probs: Tensor, count: int) -> tuple[Hypotheses, Tensor]:
    """The best `count` of all beams extended by all tokens, and the row (of B * beams) that each one extends.

    With (1 + number of stop ids) times num_beams of them, num_beams do not stop: a beam has one extension per stop id.
    """
    (batch_size, num_beams), vocab_size = beams.scores.shape, log_probs.shape[-1]
    scores = (beams.scores[:, :, None] + log_probs.view(batch_size, num_beams, vocab_size)).flatten(1)
    best = scores.topk(min(count, scores.shape[1]))
    parents, ids = best.indices // vocab_size, best.indices % vocab_size  # (B, candidates)
    tokens = torch.cat([beams.take(parents).tokens, ids[:, :, None]], dim=-1)
    first_rows = torch.arange(0, batch_size * num_beams, num_beams, device=ids.device)
    return Hypotheses(tokens, best.values), first_rows[:, None] + parents


def _finish(finished: Hypotheses, candidates: Hypotheses, ends: Tensor, divisor: float) -> Hypotheses:
    """The best of those already finished and those that end now, if they are among the best num_beams candidates."""
    num_beams = finished.scores.shape[1]
    ended = candidates.scores.masked_fill(~ends, -math.inf)[:, :num_beams] / divisor
    together = Hypotheses(
        torch.cat([F.pad(finished.tokens, (0, 1), value=NOTHING), candidates.tokens[:, :num_beams]], dim=1),
        torch.cat([finished.scores, ended], dim=1),
    )
    return together.take(together.scores.topk(num_beams).indices)


def _cannot_improve(running: Hypotheses, finished: Hypotheses, divisor: float, full_is_enough: bool) -> Tensor:
    """(B,) bool: whether a row's search is over."""
    worst = finished.scores.amin(-1)  # -inf until num_beams have finished
    return (running.scores[:, 0] / divisor <= worst) | (worst.isfinite() & full_is_enough)


def _best(finished: Hypotheses, num_return: int, pad_id: int) -> Hypotheses:
    tokens, scores = (x[:, :num_return].clone() for x in finished)  # outside inference mode, as in `generate`
    if few := (~scores.isfinite()).any(-1).nonzero().flatten().tolist():
        raise ValueError(
            f"the filters leave row(s) {few} fewer than num_return={num_return} continuations: forbid less, or ask for "
            "fewer"
        )
    length = (tokens != NOTHING).sum(-1).max()
    return Hypotheses(tokens[:, :, :length].masked_fill(tokens[:, :, :length] == NOTHING, pad_id), scores)


def _wrong_search(
    num_beams: int, num_return: int, length_penalty: float, early_stopping: bool | Literal["never"]
) -> list[str]:
    wrong = []
    if num_beams < 1:
        wrong.append(f"num_beams={num_beams}: must be at least 1, usually 4 to 10")
    if not 1 <= num_return <= max(num_beams, 1):
        wrong.append(f"num_return={num_return}: must be from 1 to num_beams={num_beams}, which is all that are kept")
    if not -10 <= length_penalty <= 10:  # lengths to a greater power leave float32
        wrong.append(f"length_penalty={length_penalty}: must be a number from -10 to 10, usually 0 to 2")
    if early_stopping not in (True, False, "never"):
        wrong.append(f"early_stopping={early_stopping!r}: must be True, False or 'never'")
    return wrong


def _wrong_size(num_beams: int, vocab_size: int, num_stops: int, max_new_tokens: int) -> list[str]:
    possible = _continuations(vocab_size, num_stops, max_new_tokens, enough=num_beams)
    if num_beams <= possible:
        return []
    return [
        f"num_beams={num_beams}: {vocab_size} token ids make only {possible} continuations of up to {max_new_tokens} "
        "tokens, so no more beams can be filled"
    ]


def _continuations(vocab_size: int, num_stops: int, max_new_tokens: int, enough: int) -> int:
    """How many different continuations there are, counted no further than `enough`."""
    ended, going = 0, 1
    for _ in range(max_new_tokens - 1):
        if ended + going * vocab_size >= enough:
            break
        ended, going = ended + going * num_stops, going * (vocab_size - num_stops)
    return ended + going * vocab_size
