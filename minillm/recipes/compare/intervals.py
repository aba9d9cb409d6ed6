"""How sure a mean score is: the bootstrap, over the records of test and over the seeds together."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 500
LEVEL = 95  # percent


def draw_scores(
    score: Callable[..., float],
    predictions: Sequence[Sequence[Any]],
    references: Sequence[Any],
    groups: Sequence[str] | None = None,
    draws: int = DRAWS,
) -> np.ndarray:
    """(draws,) mean scores of seeds and records drawn with replacement; `predictions` has one list for each seed.

    The draws are the same for all rows of a study, so the difference of two rows' scores is that of a paired bootstrap
    (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; Koehn 2004, section 4).
    """
    rng, found = np.random.default_rng(0), np.full(draws, np.nan)
    for draw in range(draws):
        seeds = rng.integers(len(predictions), size=len(predictions))
        records, named = _records(groups, len(references), rng)
        right = [references[i] for i in records]
        with contextlib.suppress(ValueError):  # this metric is not defined on these records
            found[draw] = np.mean([score([predictions[seed][i] for i in records], right, named) for seed in seeds])
    return found


def _records(groups: Sequence[str] | None, count: int, rng: np.random.Generator) -> tuple[list[int], list[str] | None]:
    """As many records as there are, or as many groups with all their records, drawn with replacement; their groups."""
    if groups is None:
        return rng.integers(count, size=count).tolist(), None
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    drawn = rng.integers(len(members), size=len(members)).tolist()
    sets = list(members.values())
    found = [(i, str(place)) for place, number in enumerate(drawn) for i in sets[number]]  # a group twice is two groups
    return [i for i, _ in found], [name for _, name in found]


def interval(values: np.ndarray) -> tuple[float, float]:
    """What holds the middle `LEVEL` percent of the draws; a metric that is undefined on some leaves those out."""
    outside = (100 - LEVEL) / 2
    low, high = np.nanpercentile(values, [outside, 100 - outside])
    return float(low), float(high)
