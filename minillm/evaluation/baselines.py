"""What a language model must beat: counts of tokens, counts of n-grams, and compressors of files.

tokens = TokenFile.open(folder).tokens
bits = bits_per_byte(NGrams(tokens, vocab_size, order=5).log_probs(held_out), num_bytes)
"""

import gzip
import lzma
import math
from typing import Literal

import numpy as np


def bits_per_byte(log_probs: np.ndarray, num_bytes: int) -> float:
    """Natural logarithms of probabilities, summed, as bits for each of the bytes that they predict."""
    return -math.fsum(log_probs) / math.log(2) / num_bytes


class Unigram:
    """Each token with its share of the training text, whatever stands before it; one is added to every count."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        _check(tokens, vocab_size)
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        self._log_probs = np.log(counts / counts.sum())

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) log p of each token."""
        return self._log_probs[tokens]


class NGrams:
    """n-grams with interpolated Kneser-Ney smoothing (Chen and Goodman 1999, section 3.1, of one discount each order).

    p_k(w | context of k - 1 tokens) = max(c - D, 0) / sum c + (D types / sum c) p_(k-1)(w | context without its first)

    c counts the n-gram in the training text; of lower orders, the different tokens that precede it there, so that
    "Francisco", which follows "San" alone, is no likely word elsewhere. types: how many different tokens follow the
    context. D = n1 / (n1 + 2 n2), from how many n-grams have a count of 1 and of 2; 1/2 where there are none of them.
    Below order 1 all tokens are alike.

    An n-gram is found from its end: of order k it is a pair (n-gram of order k - 1, the token before it), and its
    number the place of that pair among all, sorted. So numbers stay small, whatever the order.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5):
        _check(tokens, vocab_size, order)
        tokens = np.asarray(tokens, dtype=np.int64)
        self.vocab_size, self.order = vocab_size, order
        self._keys: list[np.ndarray] = []  # of the orders 2, 3, ...: the sorted pairs, as number * vocab_size + token
        self._levels: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []  # of the orders 1, 2, ...
        contexts, context = 1, np.zeros_like(tokens)  # of order 1: the empty one, at every position
        size, grams = vocab_size, tokens
        for k in range(1, order + 1):
            if k == order:
                counts = np.bincount(grams, minlength=size)
            else:
                keys, longer = np.unique(grams[1:] * vocab_size + tokens[: len(tokens) - k], return_inverse=True)
                counts = np.bincount(keys // vocab_size, minlength=size)  # different tokens before it
                self._keys.append(keys)
            self._levels.append(_level(counts, grams, context, contexts))
            if k < order:
                contexts, context, size, grams = size, grams[:-1], len(keys), longer

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) log p of each token given those before it, order - 1 at most."""
        tokens = np.asarray(tokens, dtype=np.int64)
        p = np.full(len(tokens), 1 / self.vocab_size)
        context, grams = np.zeros_like(tokens), tokens  # -1: not in the training text
        for k, (counts, totals, types, discount) in enumerate(self._levels, 1):
            total = np.where(context >= 0, totals[context], 0)
            count = np.where(grams >= 0, counts[grams], 0)
            rest = discount * types[context] * p
            p = np.where(total > 0, (np.maximum(count - discount, 0) + rest) / np.maximum(total, 1), p)
            if k < self.order:
                context = np.concatenate([[-1], grams[:-1]])
                grams = self._longer(grams, tokens, k)
        return np.log(p)

    def _longer(self, grams: np.ndarray, tokens: np.ndarray, k: int) -> np.ndarray:
        """The numbers of the n-grams of order k + 1 that end where those of order k do; -1 for those not seen."""
        keys, before = self._keys[k - 1], np.concatenate([np.full(k, -1), tokens[:-k]])[: len(tokens)]
        wanted = np.where((grams >= 0) & (before >= 0), grams * self.vocab_size + before, -1)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, at, -1)


def _level(
    counts: np.ndarray, grams: np.ndarray, context: np.ndarray, contexts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Of one order: (count of each n-gram, sum of them for each context, n-grams for each context, discount).

    grams, context (N,): the number of each position's n-gram, and of its context among `contexts` many.
    """
    context_of = np.zeros(len(counts), dtype=np.int64)
    context_of[grams] = context
    seen = counts > 0
    totals = np.bincount(context_of[seen], weights=counts[seen], minlength=contexts)
    types = np.bincount(context_of[seen], minlength=contexts)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return counts, totals, types, once / (once + 2 * twice) if once and twice else 0.5  # too little text to tell


def compressed_bits_per_byte(text: bytes, how: Literal["gzip", "xz"], known: bytes = b"") -> float:
    """What a byte of `text` takes in a compressed file, of a reader who has `known` already.

    That is the size of both together less that of `known` alone. gzip looks back only 32 kB, so that nothing which is
    known helps it; xz looks back over everything.
    """
    if not text:
        raise ValueError("compressed_bits_per_byte: there is no text")
    if how == "gzip":
        size = len(gzip.compress(known + text, 9)) - (len(gzip.compress(known, 9)) if known else 0)
    else:
        size = len(_xz(known + text)) - (len(_xz(known)) if known else 0)
    return 8 * size / len(text)


def _xz(data: bytes) -> bytes:
    window = max(4096, min(len(data), 3 << 29))  # the format's most is 1.5 GiB
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}])


def _check(tokens: np.ndarray, vocab_size: int, order: int = 1) -> None:
    tokens, wrong = np.asarray(tokens), []
    if order < 1:
        wrong.append(f"order {order} is not positive")
    if tokens.ndim != 1 or len(tokens) <= order:
        wrong.append(f"tokens of shape {tokens.shape}: one row, longer than the order, {order}")
    elif not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong.append(f"tokens from {tokens.min()} to {tokens.max()} are not all in the vocabulary 0..{vocab_size - 1}")
    if wrong:
        raise ValueError("n-grams cannot be counted: " + "; ".join(wrong))
