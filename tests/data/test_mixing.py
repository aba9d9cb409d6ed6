"""Multilingual mixing against the formula and against counts."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import Document, MixedLoader, PackedLoader, sampling_probabilities, write_tokens
from minillm.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
SIZES = {"sl": 1000, "en": 64_000, "hr": 8000}


def test_probabilities_by_hand():
    """alpha 0.5: the square roots of 1 : 9 : 4 are 1 : 3 : 2; temperature 3: the cube roots of SIZES are 10, 40, 20."""
    assert sampling_probabilities({"a": 1, "b": 9, "c": 4}, alpha=0.5) == pytest.approx(
        {"a": 1 / 6, "b": 0.5, "c": 1 / 3}
    )
    assert sampling_probabilities(SIZES, temperature=3) == pytest.approx({"sl": 1 / 7, "en": 4 / 7, "hr": 2 / 7})
    assert sampling_probabilities(SIZES, alpha=1) == pytest.approx({"sl": 1 / 73, "en": 64 / 73, "hr": 8 / 73})
    for uniform in ({"alpha": 0}, {"temperature": math.inf}):
        assert sampling_probabilities(SIZES, **uniform) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


@given(
    sizes=st.lists(st.integers(1, 10**15), min_size=1, max_size=20),
    alpha=st.floats(0, 1),
)
def test_probabilities_are_the_formula(sizes, alpha):
    found = sampling_probabilities({str(i): n for i, n in enumerate(sizes)}, alpha=alpha)
    total = sum(sizes)
    powers = [(n / total) ** alpha for n in sizes]
    assert list(found.values()) == pytest.approx([p / sum(powers) for p in powers], rel=1e-9)


@pytest.mark.parametrize(
    "sizes, named, message",
    [
        ({"sl": 0, "en": 5, "hr": -1}, {"alpha": 0.3}, r"languages without text, .*: sl \(0\), hr \(-1\)"),
        ({"sl": math.nan}, {"alpha": 0.3}, r"sl \(nan\)"),
        ({}, {"alpha": 0.3}, "there is no language"),
        (SIZES, {"temperature": 0}, "temperature 0 must be above 0"),
        (SIZES, {"temperature": -2.0}, "temperature -2.0 must be above 0"),
        (SIZES, {"alpha": -0.1}, "alpha -0.1 must be a number, at least 0"),
        (SIZES, {"alpha": math.inf}, "alpha inf"),
        (SIZES, {}, "give either alpha or temperature"),
        ({"sl": 0}, {"alpha": -1, "temperature": 0}, "give either.*alpha -1 .*temperature 0 .*sl"),
    ],
)
def test_wrong_sizes_and_exponents(sizes, named, message):
    with pytest.raises(ValueError, match=f"sampling_probabilities: .*{message}"):
        sampling_probabilities(sizes, **named)


@pytest.fixture
def files(tmp_path):
    """Three languages of one letter each."""
    return {
        name: write_tokens([Document(str(i), letter * 40) for i in range(9)], BYTES, tmp_path / name)
        for name, letter in {"sl": "s", "en": "e", "hr": "h"}.items()
    }


def make(files, names=("sl", "en", "hr"), seed=5, probabilities=None, rank=0, world_size=1, length=10):
    loaders = {name: PackedLoader(files[name], 4, length, 1, rank, world_size) for name in names}
    return MixedLoader(loaders, probabilities or {"sl": 0.25, "en": 0.6, "hr": 0.15}, seed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_batches_have_the_asked_shares(files):
    loader, n = make(files), 5000
    counts = Counter(loader.draw(step) for step in range(n))
    for name, p in loader.probabilities.items():
        assert abs(counts[name] - n * p) <= 3 * math.sqrt(n * p * (1 - p))


def test_a_batch_is_the_next_of_the_drawn_loader(files):
    loader = make(files)
    alone = make(files).loaders
    for step in range(40):
        assert same(next(loader), next(alone[loader.draw(step)]))
    assert {loader.draw(step) for step in range(40)} == {"sl", "en", "hr"}


def test_a_language_of_probability_0_is_never_drawn(files):
    loader = make(files, probabilities={"sl": 0.0, "en": 0.0, "hr": 1.0})
    assert {loader.draw(step) for step in range(500)} == {"hr"}


@pytest.mark.parametrize("steps", [0, 1, 33])
def test_resume_is_exact_whatever_the_order_of_the_loaders_and_the_number_of_ranks(files, steps):
    loader = make(files)
    for _ in range(steps):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed, half = make(files, names=("hr", "en", "sl")), make(files, rank=1, world_size=2)
    resumed.load_state_dict(state)
    half.load_state_dict(state)
    for _ in range(30):
        batch = next(loader)
        assert same(batch, next(resumed))
        assert same({name: values[1::2] for name, values in batch.items()}, next(half))


def test_state_of_other_loaders_is_refused_and_nothing_moves(files):
    """One of the three loaders would take its part of the state, the others not."""
    state = make(files)
    for _ in range(20):
        next(state)
    state = state.state_dict()
    loader = make(files, seed=6)
    loader.loaders["en"] = PackedLoader(files["en"], 4, 12, 1)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=r"seed: saved 5, now 6\nen: .*\n.*length: saved 10, now 12"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    with pytest.raises(ValueError, match="loader: saved 'PackedLoader', now 'MixedLoader'"):
        loader.load_state_dict(loader.loaders["sl"].state_dict())


def test_wrong_loaders(files):
    with pytest.raises(ValueError, match=r"loaders for \['en', 'sl'\] and probabilities for \['en', 'hr', 'sl'\]"):
        make(files, names=("sl", "en"))
    with pytest.raises(ValueError, match=r"probabilities sum to 1.5, not to 1; seed=-1: a whole number from 0"):
        make(files, probabilities={"sl": 0.5, "en": 0.5, "hr": 0.5}, seed=-1)
    with pytest.raises(ValueError, match=r"from 0 to 1, got \{'sl': -0.5\}"):
        make(files, probabilities={"sl": -0.5, "en": 0.5, "hr": 1.0})
