"""Counts and compressors: probabilities by hand, and by the formula written out over dictionaries."""

import math
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from minillm.evaluation.baselines import NGrams, Unigram, bits_per_byte, compressed_bits_per_byte


def test_unigram_is_the_share_with_one_added():
    found = np.exp(Unigram(np.array([0, 1, 1, 3]), 4).log_probs(np.array([0, 1, 2, 3])))
    np.testing.assert_allclose(found, [2 / 8, 3 / 8, 1 / 8, 2 / 8])


def test_a_bigram_worked_by_hand():
    """Text 0 1 0 2 0 1. Order 1 counts what precedes: 0 has {1, 2}, 1 has {0}, 2 has {0}; n1 = 2, n2 = 1, D = 1/2.

    p(0) = 1.5/4 + 0.5 3/4 1/3 = 0.5, p(1) = p(2) = 0.25. Order 2: counts 2 1 1 1, so n1 = 3, n2 = 1, D = 0.6.
    After 0 (3 times, 2 types): p(1) = 1.4/3 + 0.4 0.25, p(2) = 0.4/3 + 0.4 0.25, p(0) = 0.4 0.5. After 1 (once):
    p(0) = 0.4 + 0.6 0.5.
    """
    grams = NGrams(np.array([0, 1, 0, 2, 0, 1]), 3, order=2)
    np.testing.assert_allclose(np.exp(grams.log_probs(np.array([0, 1, 0, 2, 0, 0]))),
                               [0.5, 1.4 / 3 + 0.1, 0.7, 0.4 / 3 + 0.1, 0.7, 0.2])  # fmt: skip


def written_out(text, vocab_size, order):
    """The definition with dictionaries of tuples: a function (context, token) -> probability."""
    levels = []
    for k in range(1, order + 1):
        grams = [tuple(text[i : i + k]) for i in range(len(text) - k + 1)]
        if k == order:
            counts = Counter(grams)
        else:
            longer = {tuple(text[i : i + k + 1]) for i in range(len(text) - k)}
            counts = Counter(gram[1:] for gram in longer)
        n1, n2 = (sum(c == n for c in counts.values()) for n in (1, 2))
        follow = defaultdict(dict)
        for gram, count in counts.items():
            follow[gram[:-1]][gram[-1]] = count
        levels.append((follow, n1 / (n1 + 2 * n2) if n1 and n2 else 0.5))

    def p(context, token, k):
        if k == 0:
            return 1 / vocab_size
        follow, discount = levels[k - 1]
        context = context[max(0, len(context) - (k - 1)) :]
        if len(context) < k - 1 or context not in follow:
            return p(context, token, k - 1)
        found = follow[context]
        total = sum(found.values())
        own = max(found.get(token, 0) - discount, 0) / total
        return own + discount * len(found) / total * p(context, token, k - 1)

    return lambda context, token: p(tuple(context), token, order)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngrams_are_the_formula(order):
    rng = np.random.default_rng(0)
    text, held_out = rng.geometric(0.4, 400).clip(max=6), rng.geometric(0.4, 60).clip(max=7)
    expected = written_out(text.tolist(), 8, order)
    found = np.exp(NGrams(text, 8, order).log_probs(held_out))
    want = [expected(held_out[:i].tolist(), token) for i, token in enumerate(held_out.tolist())]
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 4])
def test_probabilities_sum_to_one_after_every_context(order):
    rng = np.random.default_rng(1)
    grams = NGrams(rng.integers(0, 5, 300).astype(np.uint16), 6, order)  # as tokens.bin holds them
    for context in [[], [5], [0, 5], *rng.integers(0, 5, (20, 3)).tolist()]:
        sums = sum(math.exp(grams.log_probs(np.array([*context, token]))[-1]) for token in range(6))
        assert sums == pytest.approx(1, abs=1e-12)


def test_the_end_of_the_text_as_a_context():
    """5 ends the text and nothing follows it: then the shorter context speaks."""
    grams = NGrams(np.array([0, 1, 0, 1, 0, 2, 5]), 6, order=3)
    np.testing.assert_allclose(grams.log_probs(np.array([2, 5, 1]))[-1], NGrams(
        np.array([0, 1, 0, 1, 0, 2, 5]), 6, order=3).log_probs(np.array([4, 5, 1]))[-1])  # fmt: skip


def test_longer_orders_predict_a_rhyme_better():
    text = np.tile([0, 1, 0, 2, 0, 3], 40)
    scores = [NGrams(text, 4, order).log_probs(text).mean() for order in (1, 2, 3)]
    assert scores == sorted(scores) and scores[0] < scores[2] - 0.5


def test_bits_per_byte_is_a_sum_over_bytes():
    assert bits_per_byte(np.log([0.5, 0.25]), 6) == pytest.approx(0.5)  # 1 + 2 bits of 6 bytes


def test_compressors():
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8 <= compressed_bits_per_byte(noise, "gzip") < 8.1 and 8 <= compressed_bits_per_byte(noise, "xz") < 8.1
    words = b"".join(noise[i % 50 * 8 : i % 50 * 8 + 8] for i in range(0, 5000, 7))
    assert compressed_bits_per_byte(words, "gzip") == pytest.approx(
        8 * len(zlib.compress(words, 9)) / len(words), rel=0.1
    )
    far = noise + bytes(40_000)  # 40 kB lie between what is known and its repetition: further than gzip sees
    assert compressed_bits_per_byte(noise, "gzip", known=far) > 7.9
    assert compressed_bits_per_byte(noise, "xz", known=far) < 0.1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: NGrams(np.array([0, 1, 9]), 5, 2), "tokens from 0 to 9 are not all in the vocabulary 0..4"),
        (lambda: NGrams(np.array([0, 1]), 5, 2), r"tokens of shape \(2,\): one row, longer than the order, 2"),
        (lambda: NGrams(np.array([0, 1, 2]), 5, 0), "order 0 is not positive"),
        (lambda: Unigram(np.zeros((2, 2), dtype=int), 5), r"tokens of shape \(2, 2\)"),
        (lambda: compressed_bits_per_byte(b"", "xz"), "there is no text"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
