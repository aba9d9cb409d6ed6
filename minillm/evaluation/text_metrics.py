"""Metrics of texts: answers (SQuAD), translations (BLEU, chrF), summaries (ROUGE). `metrics.py` checks their input."""

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable

from minillm.evaluation.libraries import library

Reference = str | list[str] | tuple[str, ...]  # a text, or several that are all right


def exact_match(predictions: list[str], references: list[Reference]) -> float:
    """The share of answers that are one of the right ones but for case, punctuation, articles and white space.

    As Rajpurkar et al. 2016 judge SQuAD.
    """
    return _mean_of_best(predictions, references, lambda p, r: float(_answer_words(p) == _answer_words(r)))


def token_f1(predictions: list[str], references: list[Reference]) -> float:
    """The F1 of the words that an answer shares with the nearest right one, averaged over questions (SQuAD)."""
    return _mean_of_best(predictions, references, lambda p, r: _overlap(_answer_words(p), _answer_words(r)))


def bleu(predictions: list[str], references: list[Reference]) -> float:
    """BLEU of the whole corpus (Papineni et al. 2002) as sacrebleu defines it: 13a tokens, exponential smoothing."""
    return library("sacrebleu").corpus_bleu(_texts(predictions), _columns(references)).score / 100


def chrf(predictions: list[str], references: list[Reference]) -> float:
    """chrF2 of the whole corpus (Popović 2015): character 1- to 6-grams, recall counts twice; good for inflection."""
    return library("sacrebleu").corpus_chrf(_texts(predictions), _columns(references)).score / 100


def rouge_1(predictions: list[str], references: list[Reference]) -> float:
    """ROUGE-1 F1 (Lin 2004): shared words; the best reference counts, averaged over texts. No stemming."""
    return _mean_of_best(predictions, references, lambda p, r: _overlap(_words(p), _words(r)))


def rouge_2(predictions: list[str], references: list[Reference]) -> float:
    """ROUGE-2 F1: shared pairs of neighbouring words."""
    return _mean_of_best(predictions, references, lambda p, r: _overlap(_bigrams(p), _bigrams(r)))


def rouge_l(predictions: list[str], references: list[Reference]) -> float:
    """ROUGE-L F1: the longest common subsequence of words."""

    def longest(predicted: str, reference: str) -> float:
        a, b = _words(predicted), _words(reference)
        return _f1(_common_subsequence(a, b), len(a), len(b))

    return _mean_of_best(predictions, references, longest)


def _mean_of_best(predictions: list, references: list, judge: Callable[[str, str], float]) -> float:
    pairs = zip(_texts(predictions), map(_alternatives, references), strict=True)
    return sum(max(judge(text, right) for right in alternatives) for text, alternatives in pairs) / len(predictions)


def _texts(values: list) -> list[str]:
    if strange := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"predictions must be texts, not {strange[0]!r}")
    return values


def _alternatives(reference: Reference) -> list[str]:
    alternatives = [reference] if isinstance(reference, str) else list(reference)
    if not alternatives or not all(isinstance(text, str) for text in alternatives):
        raise ValueError(f"a reference must be a text or a list of texts, not {reference!r}")
    return alternatives


def _columns(references: list[Reference]) -> list[list[str | None]]:
    """sacrebleu's order: first all the first references, then all the second; None where a text has fewer."""
    rows = [_alternatives(reference) for reference in references]
    return [[row[i] if i < len(row) else None for row in rows] for i in range(max(map(len, rows)))]


def _answer_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _words(text: str) -> list[str]:
    """Letters and digits of every script; the original ROUGE knows a to z only."""
    return re.findall(r"[^\W_]+", text.lower())


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = _words(text)
    return list(itertools.pairwise(words))


def _overlap(predicted: list, right: list) -> float:
    if not predicted or not right:
        return float(predicted == right)
    return _f1(sum((Counter(predicted) & Counter(right)).values()), len(predicted), len(right))


def _f1(common: int, predicted: int, right: int) -> float:
    return 2 * common / (predicted + right) if common else 0.0


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence, row by row of the usual table."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # the entry up and to the left
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
