"""How good predictions are: `METRICS`, name -> function(predictions, references) -> float.

1.0 is perfect in all of them and more is better; BLEU and chrF are divided by the usual 100. Labels are whole numbers
or names, tags are lists of names (one list a sentence), texts are strings, and the reference of a text may be a list
of texts that are all right. Perplexity is not among them: it judges a model, not predictions (`language_model_loss`).
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from minillm.evaluation import text_metrics
from minillm.evaluation.libraries import library

Metric = Callable[..., float]
_METRICS: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
MOST_NAMED = 5  # flaws that one error spells out


def find_metric(name: str) -> Metric:
    """The metric called `name`; ValueError lists the names there are."""
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}: one of {', '.join(METRICS)}")
    return METRICS[name]


def metric(function: Metric) -> Metric:
    """Put a metric into METRICS, behind the checks that all share.

    Every metric may be called with `groups`, the `group` of each record; those that judge records alone ignore it.
    """
    grouped = "groups" in inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(predictions: Sequence[Any], references: Sequence[Any], *, groups: Sequence[str] | None = None) -> float:
        predictions, references = _values(predictions), _values(references)
        if flaws := _flaws(predictions, references):
            more = [f"and {len(flaws) - MOST_NAMED} more"] if len(flaws) > MOST_NAMED else []
            raise ValueError(f"{function.__name__} cannot be computed: " + "; ".join(flaws[:MOST_NAMED] + more))
        return float(function(predictions, references, groups) if grouped else function(predictions, references))

    _METRICS[function.__name__] = checked
    return checked


def _values(values: Sequence[Any]) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else list(values)


def _flaws(predictions: list[Any], references: list[Any]) -> list[str]:
    flaws = [] if predictions or references else ["there are no records"]
    if len(predictions) != len(references):
        flaws.append(f"{len(predictions)} predictions for {len(references)} references")
    for kind, values in (("predictions", predictions), ("references", references)):
        strange = [i for i, v in enumerate(values) if v is None or (isinstance(v, float) and not math.isfinite(v))]
        if strange:
            flaws.append(f"{len(strange)} {kind} are no numbers: number {strange[0]} is {values[strange[0]]}")
    for i, (predicted, wanted) in enumerate(zip(predictions, references, strict=False)):
        needed = len(wanted) if isinstance(wanted, list | tuple) else 1
        if isinstance(predicted, list | tuple) and len(predicted) != needed:
            flaws.append(f"record {i} has {len(predicted)} predicted tags for {needed} words")
    return flaws


@metric
def accuracy(predictions: list, references: list) -> float:
    """The share of right labels; of sentences of tags, the share of tags. With one label a record it is micro-F1."""
    predicted, wanted = _labels(predictions), _labels(references)
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


@metric
def f1(predictions: list, references: list) -> float:
    """The F1 of class 1, of the classes 0 and 1; 0 when 1 is neither predicted nor wanted."""
    return _f1(_binary(predictions), _binary(references), average="binary")


@metric
def f1a(predictions: list, references: list) -> float:
    """MultiRC's F1 over all answers of all questions, whatever their group (Khashabi et al. 2018)."""
    return _f1(_binary(predictions), _binary(references), average="binary")


@metric
def macro_f1(predictions: list, references: list) -> float:
    """The mean of the F1s of all classes that are predicted or wanted somewhere."""
    return _f1(_labels(predictions), _labels(references), average="macro")


def _f1(predicted: list, wanted: list, average: str) -> float:
    return library("sklearn.metrics").f1_score(wanted, predicted, average=average, zero_division=0.0)


@metric
def matthews(predictions: list, references: list) -> float:
    """Matthews' correlation, from -1 to 1; 0 when all predictions, or all references, are of one class."""
    predicted, wanted = _labels(predictions), _labels(references)
    return library("sklearn.metrics").matthews_corrcoef(wanted, predicted)


@metric
def group_exact_match(predictions: list, references: list, groups: Sequence[str] | None) -> float:
    """The share of groups, such as MultiRC's questions, whose every label is right."""
    predicted, wanted = _labels(predictions), _labels(references)
    if groups is None or len(groups) != len(wanted) or not all(groups):
        raise ValueError("group_exact_match needs groups=, one name for each record: the `group` of the task's records")
    wrong = {group for group, p, w in zip(groups, predicted, wanted, strict=True) if p != w}
    return 1 - len(wrong) / len(set(groups))


@metric
def pearson(predictions: list, references: list) -> float:
    """Pearson's correlation of scores; 0 when all predictions are equal, because they then say nothing."""
    predicted, wanted = _scores(predictions, references)
    return 0.0 if np.ptp(predicted) == 0 else float(np.corrcoef(predicted, wanted)[0, 1])


@metric
def spearman(predictions: list, references: list) -> float:
    """Spearman's correlation of ranks, ties sharing their mean rank; 0 when all predictions are equal."""
    predicted, wanted = _scores(predictions, references)
    return 0.0 if np.ptp(predicted) == 0 else library("scipy.stats").spearmanr(predicted, wanted).statistic


@metric
def span_f1(predictions: list, references: list) -> float:
    """The micro-F1 of whole entities in BIO tags, kind and both ends right, as conlleval and seqeval count."""
    for i, tags in enumerate([*predictions, *references]):
        wrong = [] if isinstance(tags, str) else [t for t in tags if t != "O" and str(t)[:2] not in ("B-", "I-")]
        if isinstance(tags, str) or wrong:
            shown = tags if isinstance(tags, str) else wrong[0]
            raise ValueError(f"span_f1 needs lists of tags such as B-person, I-person and O; number {i} has {shown!r}")
    return library("seqeval.metrics").f1_score(references, predictions, average="micro", zero_division=0)


for _function in (
    text_metrics.exact_match,
    text_metrics.token_f1,
    text_metrics.bleu,
    text_metrics.chrf,
    text_metrics.rouge_1,
    text_metrics.rouge_2,
    text_metrics.rouge_l,
):
    metric(_function)


def _labels(values: list) -> list:
    """Labels in one list, sentences of tags joined; a float is a score or a probability, not a label."""
    flat = [label for v in values for label in (v if isinstance(v, list | tuple) else [v])]
    if strange := [label for label in flat if not isinstance(label, int | str | np.integer)]:
        raise ValueError(f"labels are whole numbers or names, not {strange[0]!r} (a score? take the likeliest class)")
    return flat


def _binary(values: list) -> list:
    labels = _labels(values)
    if strange := [label for label in labels if label not in (0, 1)]:
        raise ValueError(f"this metric is for the classes 0 and 1, not {strange[0]!r}; macro_f1 takes more")
    return labels


def _scores(predictions: list, references: list) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if len(wanted) < 2 or np.ptp(wanted) == 0:
        raise ValueError(f"a correlation needs references that differ; all {len(wanted)} are {references[0]}")
    return predicted, wanted
