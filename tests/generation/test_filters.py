"""Filters that look back, against transformers' logits processors, which are told prompt and new tokens in one."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.generation import (
    forced_first,
    forced_last,
    generate_tokens,
    known_ids,
    min_new_tokens,
    no_repeat_ngram,
    repetition_penalty,
)
from minillm.models import ModelConfig, build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.generation import logits_process as theirs

V = 7


@st.composite
def some_step(draw):
    """Logits (B, V) of both signs and tokens (B, T) with many repetitions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ids = draw(st.integers(1, V))  # few different ids make many repetitions
    return torch.randn(batch, V, generator=generator), torch.randint(0, ids, (batch, length), generator=generator)


@given(some_step(), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_no_repeat_ngram_is_transformers(step, n):
    logits, tokens = step
    want = theirs.NoRepeatNGramLogitsProcessor(n)(tokens, logits.clone())
    assert torch.equal(no_repeat_ngram(n)(logits, tokens, 1), want)


@given(some_step(), st.floats(0.1, 3.0))
@settings(max_examples=100, deadline=None)
def test_repetition_penalty_is_transformers(step, penalty):
    logits, tokens = step
    want = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(repetition_penalty(penalty)(logits, tokens, 1), want)


@given(some_step(), st.integers(0, 12), st.integers(0, 6), st.sets(st.integers(0, V - 1), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_min_new_tokens_is_transformers(step, at_least, num_new, stop_ids):
    logits, tokens = step
    num_new = min(num_new, tokens.shape[1])
    want = theirs.MinNewTokensLengthLogitsProcessor(tokens.shape[1] - num_new, at_least, sorted(stop_ids))
    assert torch.equal(min_new_tokens(at_least, stop_ids)(logits, tokens, num_new), want(tokens, logits.clone()))
    min_length = theirs.MinLengthLogitsProcessor(at_least + 1, sorted(stop_ids))  # counts the start
    want = min_length(tokens, logits.clone())
    assert torch.equal(min_new_tokens(at_least, stop_ids)(logits, tokens, tokens.shape[1] - 1), want)


@given(some_step(), st.integers(1, 12), st.integers(0, V - 1))
@settings(max_examples=100, deadline=None)
def test_forced_tokens_are_transformers(step, max_new_tokens, token):
    """An encoder-decoder's: there is one start token before the new ones."""
    logits, tokens = step
    num_new = tokens.shape[1] - 1
    want = theirs.ForcedBOSTokenLogitsProcessor(token)(tokens, logits.clone())
    assert torch.equal(forced_first(token)(logits, tokens, num_new), want)
    want = theirs.ForcedEOSTokenLogitsProcessor(max_new_tokens + 1, token)(tokens, logits.clone())
    assert torch.equal(forced_last(token, max_new_tokens)(logits, tokens, num_new), want)


@given(some_step())
@settings(max_examples=30, deadline=None)
def test_filters_leave_their_input_alone_and_padding_out(step):
    """-1 is padding: with it in front every filter says what it says without."""
    logits, tokens = step
    logits_before, padded = logits.clone(), torch.cat([torch.full((len(tokens), 3), -1), tokens], dim=1)
    filters = [no_repeat_ngram(n) for n in (1, 2, 3, 5)] + [repetition_penalty(1.3), min_new_tokens(3, [1])]
    for keep in [*filters, forced_first(2), forced_last(2, 5)]:
        assert torch.equal(keep(logits, tokens, 1), keep(logits, padded, 1))
        assert torch.equal(logits, logits_before)


def test_by_hand():
    logits = torch.zeros(1, 4)
    said = torch.tensor([[3, 1, 2, 3, 1]])
    assert (no_repeat_ngram(3)(logits, said, 2) == -math.inf).tolist() == [[False, False, True, False]]  # 3 1 2 was
    assert (no_repeat_ngram(1)(logits, said, 2) == -math.inf).tolist() == [[False, True, True, True]]
    assert repetition_penalty(2.0)(torch.tensor([[4.0, -4.0, 4.0]]), torch.tensor([[1, 2]]), 0).tolist() == [[4, -8, 2]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(ModelConfig(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, max_positions=32)).eval()


def test_generation_without_a_token_left(model):
    """No token a second time, so a vocabulary of 7 and a prompt of 2 leave 5 steps."""
    options = {"filters": [no_repeat_ngram(1)]}
    tokens = torch.tensor([[1, 2], [3, 3]])
    assert generate_tokens(model, tokens, max_new_tokens=5, **options)[0].sort().values.tolist() == [0, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"the filters leave no token for row\(s\) \[0\] after 5 new ones"):
        generate_tokens(model, tokens, max_new_tokens=6, **options)


def test_the_filters_act_in_order_and_before_the_sampler(model):
    seen = []

    def watch(logits, tokens, num_new):
        seen.append((tokens.tolist(), num_new))
        return logits

    mask = torch.tensor([[False, True]])
    got = generate_tokens(
        model, torch.tensor([[0, 3]]), mask=mask, max_new_tokens=2, filters=[forced_first(4), forced_last(6, 1), watch]
    )
    assert seen == [([[-1, 3]], 0), ([[-1, 3, 6]], 1)] and got[0, 0] == 6  # the second of two that force has its way


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: no_repeat_ngram(0), r"no_repeat_ngram\(0\): n must be at least 1"),
        (lambda: repetition_penalty(0), r"repetition_penalty\(0\): must be a number above 0"),
        (lambda: repetition_penalty(math.nan), r"repetition_penalty\(nan\)"),
        (lambda: min_new_tokens(-1, [0]), r"min_new_tokens\(-1, \.\.\.\): must be at least 0"),
        (lambda: forced_first(V)(torch.zeros(1, V), torch.zeros(1, 1).long(), 0), r"token ids \[7\].* 0\.\.6"),
        (lambda: min_new_tokens(2, [-1, 8])(torch.zeros(1, V), torch.zeros(1, 1).long(), 0), r"token ids \[-1, 8\]"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_known_ids_are_the_first_ones():
    logits = torch.randn(2, 7)
    kept = known_ids(5)(logits, torch.zeros(2, 3, dtype=torch.long), 0)
    assert torch.equal(kept[:, :5], logits[:, :5]) and (kept[:, 5:] == -math.inf).all()
    with pytest.raises(ValueError, match="must be at least 1"):
        known_ids(0)
