"""Spreads and intervals against formulas, a full enumeration of resamples, and scipy."""

import itertools
import math

import numpy as np
import pytest

from minillm.evaluation import (
    METRICS,
    bootstrap,
    bootstrap_metric,
    over_seeds,
    paired_bootstrap,
    paired_bootstrap_metric,
)


def test_seeds_by_hand():
    spread = over_seeds([1.0, 2.0, 6.0])
    assert (spread.mean, spread.std, spread.runs) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)), 3)
    assert over_seeds([0.5]).mean == 0.5 and math.isnan(over_seeds([0.5]).std)


def test_the_interval_is_that_of_all_resamples():
    values = [0.0, 1.0, 5.0, 6.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))]
    expected = np.quantile(means, [0.1, 0.9])
    found = bootstrap(values, confidence=0.8, resamples=200_000)
    assert found.mean == 3.0
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.01)


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).exponential(size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap(values, confidence=0.9, resamples=50_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert ours.mean == pytest.approx(values.mean())


def test_the_interval_of_an_accuracy_is_near_the_normal_one():
    right = [1.0] * 300 + [0.0] * 100
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    found = bootstrap(right)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)


def test_long_lists_are_drawn_in_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap(values, resamples=1000)
    monkeypatch.setattr("minillm.evaluation.statistics.BLOCK", 120)  # two resamples at a time
    assert bootstrap(values, resamples=1000) == whole


def test_the_seed_decides():
    values = [0.0, 1.0, 3.0, 7.0, 9.0]
    assert bootstrap(values, resamples=100) == bootstrap(values, resamples=100, seed=0)
    assert bootstrap(values, resamples=100) != bootstrap(values, resamples=100, seed=1)


def test_a_metric_that_is_no_mean():
    predicted, wanted = [1, 1, 0, 1, 0, 0, 1, 0] * 10, [1, 0, 0, 1, 1, 0, 1, 0] * 10
    right = [float(p == w) for p, w in zip(predicted, wanted, strict=True)]
    by_records = bootstrap(right, resamples=2000)
    anew = bootstrap_metric(METRICS["accuracy"], predicted, wanted, resamples=1000)
    assert (anew.low, anew.high) == pytest.approx((by_records.low, by_records.high), abs=0.02)
    f1 = bootstrap_metric(METRICS["f1"], predicted, wanted, resamples=200)
    assert f1.low < f1.mean == METRICS["f1"](predicted, wanted) < f1.high
    with pytest.raises(ValueError, match="needs references that differ"):
        bootstrap_metric(METRICS["pearson"], [1.0, 2.0], [1.0, 2.0], resamples=50)


def test_whole_groups_are_drawn():
    wanted, groups = [1] * 300, [str(i // 30) for i in range(300)]
    predicted = [int(i // 30 < 5) for i in range(300)]  # a group is all right or all wrong
    together = bootstrap_metric(METRICS["accuracy"], predicted, wanted, groups=groups, resamples=1000)
    of_groups = bootstrap([1.0] * 5 + [0.0] * 5, resamples=4000)  # ten records in truth, not three hundred
    assert (together.low, together.high) == pytest.approx((of_groups.low, of_groups.high), abs=0.051)
    alone = bootstrap_metric(METRICS["accuracy"], predicted, wanted, resamples=400)
    assert alone.high - alone.low < 0.5 * (together.high - together.low)
    predicted[0] = 0  # one wrong answer spoils its group, also where the group is drawn twice
    exact = bootstrap_metric(METRICS["group_exact_match"], predicted, wanted, groups=groups, resamples=1000)
    of_groups = bootstrap([1.0] * 4 + [0.0] * 6, resamples=4000)
    assert exact.mean == pytest.approx(0.4)
    assert (exact.low, exact.high) == pytest.approx((of_groups.low, of_groups.high), abs=0.051)


def test_pairs_of_a_metric_that_is_no_mean():
    generator = np.random.default_rng(0)
    wanted = generator.integers(2, size=200)
    first, second = (np.where(generator.random(200) < right, wanted, 1 - wanted).tolist() for right in (0.9, 0.7))
    wanted = wanted.tolist()
    right = [[float(p == w) for p, w in zip(system, wanted, strict=True)] for system in (first, second)]
    by_records = paired_bootstrap(*right, resamples=600)
    anew = paired_bootstrap_metric(METRICS["accuracy"], first, second, wanted, resamples=600)
    assert anew.difference.mean == pytest.approx(by_records.difference.mean)
    assert (anew.difference.low, anew.difference.high) == pytest.approx(
        (by_records.difference.low, by_records.difference.high), abs=0.02
    )
    found = paired_bootstrap_metric(METRICS["f1"], first, second, wanted, resamples=150)
    assert found.difference.low > 0 and found.p_value < 0.02
    same = paired_bootstrap_metric(METRICS["f1"], first, first, wanted, resamples=50)
    assert (same.p_value, same.difference.low, same.difference.high) == (1.0, 0.0, 0.0)


def test_pairs_see_what_two_intervals_hide():
    generator = np.random.default_rng(0)
    ease = generator.normal(size=100)  # of the records, the same for both systems
    first = ease + 0.1 + 0.05 * generator.normal(size=100)
    found = paired_bootstrap(first, ease)
    assert found.difference.low > 0.08 and found.p_value < 0.001
    assert bootstrap(first).low < bootstrap(ease).high  # one by one they cannot be told apart
    backwards = paired_bootstrap(ease, first)
    assert backwards.difference.mean == pytest.approx(-found.difference.mean)
    assert backwards.p_value == found.p_value


def test_equal_systems():
    same = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (same.p_value, same.difference.low, same.difference.high) == (1.0, 0.0, 0.0)


def test_the_p_value_by_hand():
    # of the 27 resamples of (1, 1, -1), those with at least two -1 have a mean below 0: 7 (one 0 is impossible)
    found = paired_bootstrap([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], resamples=100_000)
    assert found.p_value == pytest.approx(2 * 7 / 27, abs=0.01)


def test_under_the_null_few_differences_are_significant():
    generator = np.random.default_rng(0)
    found = [paired_bootstrap(*generator.normal(size=(2, 80)), resamples=400).p_value for _ in range(200)]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.11


def test_bad_input_is_one_error():
    with pytest.raises(ValueError, match=r"2 of 3 values are no numbers: number 1 is nan"):
        bootstrap([1.0, math.nan, math.inf])
    for empty in ([], [[1.0]]):
        with pytest.raises(ValueError, match="must be a list of numbers, at least one"):
            over_seeds(empty)
    with pytest.raises(ValueError, match="judged on 1 and 2 records"):
        paired_bootstrap([1.0], [1.0, 2.0])
    for wrong in ({"confidence": 95}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="between 0 and 1, and at least 1"):
            bootstrap([1.0, 2.0], **wrong)
    with pytest.raises(ValueError, match=r"must be as many, at least one; there are \[1, 2\]"):
        bootstrap_metric(METRICS["accuracy"], [1], [1, 0])
    with pytest.raises(ValueError, match=r"must be as many, at least one; there are \[2, 2, 2, 1\]"):
        paired_bootstrap_metric(METRICS["accuracy"], [1, 0], [1, 1], [1, 0], groups=["a"])
