"""Filters against transformers' logits processors; samplers against softmax."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.generation import greedy, sampler, temperature, top_k, top_p

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )


@st.composite
def some_logits(draw):
    """(B, V) with odd and even V, close to certain and close to uniform, and with many ties."""
    batch, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 33))
    scale, levels = draw(st.sampled_from([0.01, 1.0, 30.0])), draw(st.sampled_from([2, 5, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-levels, levels + 1, (batch, vocab), generator=generator).float() / levels * scale


@given(some_logits(), st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_temperature_is_transformers(logits, t):
    assert torch.equal(temperature(logits, t), TemperatureLogitsWarper(t)(None, logits))


@given(some_logits(), st.integers(1, 33))
@settings(max_examples=100, deadline=None)
def test_top_k_is_transformers(logits, k):
    k = min(k, logits.shape[1])
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@given(some_logits(), st.floats(0.001, 1.0))
@settings(max_examples=100, deadline=None)
def test_top_p_is_transformers(logits, p):
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@given(some_logits(), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    """The definition, in float64: what is kept sums to p, and without its least likely member it would not."""
    probabilities = logits.double().softmax(-1)
    kept = top_p(logits, p).isfinite()
    for row, keep in zip(probabilities, kept, strict=True):
        assert keep.all() or row[keep].min() >= row[~keep].max()
        assert row[keep].sum() >= p - 1e-6
        assert row[keep].sum() - row[keep].min() <= p + 1e-6


@given(some_logits(), st.floats(0.1, 2), st.integers(1, 33), st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_filters_compose_as_in_transformers(logits, t, k, p):
    k = min(k, logits.shape[1])
    want = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(t)(None, logits)))
    assert torch.equal(top_p(top_k(temperature(logits, t), k), p), want)


def test_filters_leave_their_input_alone():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    before = logits.clone()
    for keep in (lambda x: temperature(x, 0.5), lambda x: top_k(x, 1), lambda x: top_p(x, 0.1)):
        keep(logits)
        assert torch.equal(logits, before)


def test_by_hand():
    """exp of the logits is 4 : 2 : 1 : 1, so the probabilities are 1/2, 1/4, 1/8, 1/8."""
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    assert top_k(logits, 2).softmax(-1).tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3), 0, 0]]
    assert (top_k(logits, 3) > -math.inf).tolist() == [[True, True, True, True]]  # the third ties with the fourth
    assert (top_p(logits, 0.5) > -math.inf).tolist() == [[True, False, False, False]]
    assert (top_p(logits, 0.51) > -math.inf).tolist() == [[True, True, False, False]]
    assert (top_p(logits, 1e-9) > -math.inf).tolist() == [[True, False, False, False]]  # 1 - p rounds to 1
    torch.testing.assert_close(temperature(logits, 0.5).softmax(-1), torch.tensor([[16, 4, 1, 1]]) / 22)


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[1.0, 2.0, 2.0], [5.0, 1.0, 5.0]])).tolist() == [1, 0]
    assert sampler(temperature=0) is greedy


@pytest.mark.parametrize(
    "settings, keep",
    [
        ({}, lambda x: x),
        ({"temperature": 0.5}, lambda x: x / 0.5),
        ({"top_k": 3}, lambda x: TopKLogitsWarper(3)(None, x)),
        ({"top_p": 0.7}, lambda x: TopPLogitsWarper(0.7)(None, x)),
        (
            {"temperature": 2.0, "top_k": 5, "top_p": 0.9},
            lambda x: TopPLogitsWarper(0.9)(None, TopKLogitsWarper(5)(None, x / 2)),
        ),
    ],
)
def test_frequencies_are_the_softmax(settings, keep):
    """Pearson's chi-square over 20000 draws: with d degrees of freedom its mean is d, its deviation sqrt(2 d)."""
    draws = 20_000
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.3]])
    expected = keep(logits).softmax(-1)[0].double() * draws
    draw = sampler(**settings, generator=torch.Generator().manual_seed(0))
    counts = draw(logits.expand(draws, -1)).bincount(minlength=7).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_generator_makes_draws_repeatable_and_rows_independent():
    logits = torch.zeros(64, 50)
    first, again, other = (sampler(generator=torch.Generator().manual_seed(s))(logits) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.unique().numel() > 20  # 64 rows with equal logits draw different tokens


def test_all_wrong_settings_in_one_message():
    with pytest.raises(ValueError) as error:
        sampler(temperature=-1, top_k=0, top_p=1.5)
    message = str(error.value)
    assert "temperature=-1: must be 0 (greedy) or a positive number" in message
    assert "top_k=0: must be a whole number from 1 to the size of the vocabulary" in message
    assert "top_p=1.5: is a probability and must be above 0 and at most 1" in message


@pytest.mark.parametrize("t", [-0.1, math.nan, math.inf, -math.inf])
def test_bad_temperature(t):
    with pytest.raises(ValueError, match=r"temperature=.*must be 0 \(greedy\) or a positive number"):
        sampler(temperature=t)
    with pytest.raises(ValueError, match="temperature="):
        temperature(torch.zeros(1, 3), t)


def test_temperature_too_small_or_zero():
    with pytest.raises(ValueError, match="temperature=1e-50: too small to divide by; use 0 for greedy"):
        sampler(temperature=1e-50)
    with pytest.raises(ValueError, match="temperature=0 cannot divide: use greedy"):
        temperature(torch.zeros(1, 3), 0)


@pytest.mark.parametrize("p", [0, 0.0, -0.5, 1.0001, math.nan, math.inf])
def test_bad_top_p(p):
    with pytest.raises(ValueError, match=r"top_p=.*must be above 0 and at most 1"):
        sampler(top_p=p)
    with pytest.raises(ValueError, match="top_p="):
        top_p(torch.zeros(1, 3), p)


@pytest.mark.parametrize("k", [0, -1, 2.5, math.nan, 4])
def test_bad_top_k(k):
    with pytest.raises(ValueError, match=r"top_k=.*must be a whole number from 1 to 3"):
        sampler(top_k=k, vocab_size=3)
    with pytest.raises(ValueError, match=r"top_k=.*from 1 to 3"):
        top_k(torch.zeros(1, 3), k)


def test_top_k_larger_than_the_vocabulary_is_found_at_the_first_logits():
    draw = sampler(top_k=4)
    with pytest.raises(ValueError, match="top_k=4: must be a whole number from 1 to 3"):
        draw(torch.zeros(1, 3))
