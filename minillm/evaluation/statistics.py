"""How far a score can be trusted: its spread over seeds, and intervals by resampling the test records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
BLOCK = 4_000_000  # drawn numbers held in memory at a time: 32 MB


@dataclass(frozen=True)
class Spread:
    """The mean of several runs and their standard deviation, with n - 1 in the denominator; nan for a single run."""

    mean: float
    std: float
    runs: int


@dataclass(frozen=True)
class Interval:
    """A mean over test records, and where it lies with `confidence`, had other records been drawn."""

    mean: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """How much the first system is better than the second on the same records.

    p_value: two-sided; twice the share of resamples in which the difference is not on its own side of 0.
    """

    difference: Interval
    p_value: float


def over_seeds(scores: Sequence[float]) -> Spread:
    """Mean and standard deviation of one score of runs that differ in their seed only."""
    values = _finite("scores", scores)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan"), len(values))


def bootstrap(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval (Efron 1979) of the mean of `values`, one for each test record.

    Example: `bootstrap([float(p == r) for p, r in zip(predictions, references)])` is that of an accuracy.
    """
    array = _finite("values", values)
    return _interval(array.mean(), _resampled_means(array, resamples, seed), confidence)


def bootstrap_metric(
    metric: Callable[..., float],
    predictions: Sequence,
    references: Sequence,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The same for a metric that is no mean over records, such as F1, a correlation or BLEU: it is computed anew.

    Resamples in which the metric is not defined, such as a correlation with one class only, raise its error.
    """
    _check(confidence, resamples)
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many of each, and some")
    generator = np.random.default_rng(seed)
    scores = [
        metric([predictions[i] for i in drawn], [references[i] for i in drawn])
        for drawn in (generator.integers(len(references), size=len(references)) for _ in range(resamples))
    ]
    return _interval(metric(predictions, references), np.array(scores), confidence)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Is the first system better, or were the records kind to it? (Koehn 2004; Berg-Kirkpatrick et al. 2012)

    first, second: the systems' scores of the same records in the same order. Both are judged on the same resamples, so
    what makes a record easy or hard for both falls out.
    """
    a, b = _finite("first", first), _finite("second", second)
    if len(a) != len(b):
        raise ValueError(f"the systems were judged on {len(a)} and {len(b)} records; a pair needs the same ones")
    differences = a - b
    means = _resampled_means(differences, resamples, seed)
    other_side = int(min(np.sum(means <= 0), np.sum(means >= 0)))
    p_value = min(1.0, 2 * (other_side + 1) / (resamples + 1))  # the data are one resample more: never 0
    return Comparison(_interval(differences.mean(), means, confidence), p_value)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    _check(0.5, resamples)
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(values))
    blocks = [
        values[generator.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(blocks)


def _interval(mean: float, resampled: np.ndarray, confidence: float) -> Interval:
    _check(confidence, len(resampled))
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(mean), float(low), float(high), confidence)


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of numbers, at least one; it has the shape {array.shape}")
    if strange := np.flatnonzero(~np.isfinite(array)).tolist():
        first = strange[0]
        raise ValueError(f"{len(strange)} of {len(array)} {name} are no numbers: number {first} is {array[first]}")
    return array


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence={confidence}, resamples={resamples}: between 0 and 1, and at least 1")
