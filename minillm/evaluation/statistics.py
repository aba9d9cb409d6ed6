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
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The same for a metric that is no mean over records, such as F1, a correlation or BLEU: it is computed anew.

    groups: the `group` of each record; then whole groups are drawn, because their records stand or fall together, and
    the metric is given them. Resamples in which the metric is not defined, such as a correlation with references that
    are all equal, raise its error.
    """
    scores = _resampled_scores(metric, [predictions], references, groups, resamples, seed)[:, 0]
    return _interval(_score(metric, predictions, references, groups), scores, confidence)


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
    return _compare(differences.mean(), _resampled_means(differences, resamples, seed), confidence)


def paired_bootstrap_metric(
    metric: Callable[..., float],
    first: Sequence,
    second: Sequence,
    references: Sequence,
    *,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """The same for a metric that is no mean over records; first and second are the systems' predictions."""
    scores = _resampled_scores(metric, [first, second], references, groups, resamples, seed)
    difference = _score(metric, first, references, groups) - _score(metric, second, references, groups)
    return _compare(difference, scores[:, 0] - scores[:, 1], confidence)


def _compare(difference: float, resampled: np.ndarray, confidence: float) -> Comparison:
    other_side = int(min(np.sum(resampled <= 0), np.sum(resampled >= 0)))
    p_value = min(1.0, 2 * (other_side + 1) / (len(resampled) + 1))  # the data are one resample more: never 0
    return Comparison(_interval(difference, resampled, confidence), p_value)


def _score(metric: Callable[..., float], predictions: Sequence, references: Sequence, groups: Sequence | None) -> float:
    return metric(predictions, references) if groups is None else metric(predictions, references, groups=groups)


def _resampled_scores(
    metric: Callable[..., float],
    systems: Sequence[Sequence],
    references: Sequence,
    groups: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """The metric of every system on the same resamples (resamples, systems)."""
    _check(0.5, resamples)
    lengths = [*map(len, systems), len(references), *([] if groups is None else [len(groups)])]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"predictions, references and groups must be as many, at least one; there are {lengths}")
    units: dict[object, list[int]] = {}  # what is drawn: a group of records, or each record
    for i in range(len(references)):
        units.setdefault(i if groups is None else groups[i], []).append(i)
    members, generator = list(units.values()), np.random.default_rng(seed)
    scores = np.empty((resamples, len(systems)))
    for row in scores:
        drawn = generator.integers(len(members), size=len(members))
        places = [i for unit in drawn for i in members[unit]]
        # a group that is drawn twice is two groups
        names = None if groups is None else [str(n) for n, unit in enumerate(drawn) for _ in members[unit]]
        wanted = [references[i] for i in places]
        row[:] = [_score(metric, [system[i] for i in places], wanted, names) for system in systems]
    return scores


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
