"""T5's span corruption: exact reconstruction, and the algorithm as published, written again in numpy."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import (
    Document,
    ObjectiveLoader,
    SpanCorruption,
    encoder_decoder_batch,
    restore_spans,
    sentinel_ids,
    text_length,
    write_tokens,
)
from minillm.data.spans import corrupt_spans, corrupted_lengths, random_spans, span_counts
from minillm.tokenizers import ByteTokenizer

VOCAB, PAD, EOS = 300, 0, 1
SENTINELS = sentinel_ids(VOCAB, 150)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**fields):
    settings = {"sentinels": SENTINELS, "vocab_size": VOCAB, "eos_id": EOS, "pad_id": PAD, "decoder_start_id": PAD}
    return SpanCorruption(**settings | fields)


# --- the published algorithm (Raffel et al. 2020; the collator for T5 in transformers' Flax examples)


def published_counts(length, density, mean):
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    return noise, max(int(np.round(min(noise, length - noise) / mean)), 1)


def published_segments(first_in_segment):
    """Lengths of the segments that begin where the flags stand; one begins at 0."""
    ids = np.cumsum(np.pad(first_in_segment, [[1, 0]]))
    return np.unique(ids, return_counts=True)[1]


def published_mask(kept, noise):
    """Kept and noise segments interleaved: every odd segment is noise."""
    starts = np.cumsum(np.stack([kept, noise], axis=1).reshape(-1))[:-1]
    flags = np.zeros(sum(kept) + sum(noise), dtype=np.int8)
    flags[starts] = True
    return np.cumsum(flags) % 2 == 1


def published_side(tokens, mask):
    """Each run of `mask` becomes one sentinel, counted down from the end of the vocabulary."""
    first = mask & ~np.pad(mask[:-1], [[1, 0]])
    ids = np.where(first, VOCAB - np.cumsum(first), tokens)
    return [*ids[first | ~mask].tolist(), EOS]


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.3, 2.0), (0.5, 1.0), (0.5, 3.0), (0.15, 10.0)])
@pytest.mark.parametrize("length", [2, 3, 5, 10, 21, 64, 100, 257])
def test_equals_the_published_algorithm_given_the_same_draws(length, density, mean):
    noise, spans = span_counts(length, density, mean)
    assert (noise, spans) == published_counts(length, density, mean)
    replay, segments = generator(length), []
    for total in (length - noise, noise):  # theirs shuffles flags, ours picks the places of those that are set
        flags = np.zeros(total - 1, dtype=bool)
        flags[torch.randperm(total - 1, generator=replay)[: spans - 1].numpy()] = True
        segments.append(published_segments(flags))
    mask = published_mask(*segments)
    row = torch.randint(2, 100, (1, length), generator=generator())
    assert random_spans(length, generator(length), density, mean).tolist() == mask.tolist()
    batch = objective(noise_density=density, mean_span_length=mean)(row, row > 0, generator(length))
    assert batch["source"][0].tolist() == published_side(row[0].numpy(), mask)
    assert batch["labels"][0].tolist() == published_side(row[0].numpy(), ~mask)
    assert (batch["source"].shape[1], batch["labels"].shape[1]) == corrupted_lengths(length, density, mean)


def test_all_places_are_equally_likely():
    """4 of 9 tokens in 2 spans: 3 ways to part 4, 4 ways to part 5. Chi-square with 11 degrees of freedom."""
    draws, source = 12_000, generator()
    expected = {
        tuple([0] * a + [1] * b + [0] * (5 - a) + [1] * (4 - b)) for a, b in itertools.product(range(1, 5), range(1, 4))
    }
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        counts[tuple(random_spans(9, source, 0.45, 2.0).int().tolist())] += 1
    chi_square = sum((n - draws / 12) ** 2 / (draws / 12) for n in counts.values())
    assert len(counts) == 12 and chi_square <= 11 + 3 * math.sqrt(2 * 11)


def test_shares_of_20000_tokens():
    noise = torch.cat([random_spans(512, generator(seed)) for seed in range(40)])
    begins = noise & ~torch.cat([torch.tensor([False]), noise[:-1]])
    assert noise.sum() == 40 * round(512 * 0.15)
    assert begins.sum() == 40 * round(round(512 * 0.15) / 3)


def test_the_paper_s_figure():
    """Figure 2: 12 tokens, "for inviting" and "last" cut out; kept text at the end is closed by a last sentinel."""
    row = torch.arange(10, 22)
    noise = torch.tensor([i in (2, 3, 8) for i in range(12)])
    x, y, z = SENTINELS[:3]
    source, target = corrupt_spans(row, noise, SENTINELS)
    assert (x, y, z) == (299, 298, 297)
    assert source.tolist() == [10, 11, x, 14, 15, 16, 17, y, 19, 20, 21]
    assert target.tolist() == [x, 12, 13, y, 18, z]
    source, target = corrupt_spans(row, ~noise, SENTINELS)  # a cut at the beginning and at the end
    assert source.tolist() == [x, 12, 13, y, 18, z]
    assert target.tolist() == [x, 10, 11, y, 14, 15, 16, 17, z, 19, 20, 21]


# --- exact reconstruction


@given(row=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=60))
def test_any_mask_is_undone(row):
    tokens, noise = torch.tensor([token for token, _ in row]), torch.tensor([cut for _, cut in row])
    source, target = corrupt_spans(tokens, noise, SENTINELS)
    assert torch.equal(restore_spans(source, target, SENTINELS), tokens)
    assert sum(token < 100 for token in source.tolist()) == (~noise).sum()


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=80), min_size=1, max_size=4),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1, 20),
    seed=st.integers(0, 999),
)
def test_any_text_is_restored_from_the_batch(rows, density, mean, seed):
    """Any content, padding and end-of-text ids included, any length; rows of different lengths in one batch."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    batch = objective(noise_density=density, mean_span_length=mean)(tokens, mask, generator(seed))
    for i, row in enumerate(rows):
        source = batch["source"][i][batch["source_mask"][i]]
        target = batch["labels"][i][batch["mask"][i]]
        assert source[-1] == target[-1] == EOS
        assert restore_spans(source[:-1], target[:-1], SENTINELS).tolist() == row
        assert (len(row) == 1) == torch.equal(source[:-1], torch.tensor(row))  # only a single token stays whole
        assert batch["tokens"][i, 0] == PAD
        assert batch["tokens"][i, 1 : len(target)].tolist() == target[:-1].tolist()
    assert torch.equal(batch["labels"] == -100, ~batch["mask"])


def test_encoder_decoder_batch_by_hand():
    sources, targets = [torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([9]), torch.tensor([10, 11])]
    batch = encoder_decoder_batch(sources, targets, pad_id=0, decoder_start_id=2)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "source": [[5, 6, 7], [8, 0, 0]],
        "source_mask": [[True, True, True], [True, False, False]],
        "tokens": [[2, 9], [2, 10]],
        "labels": [[9, -100], [10, 11]],
        "mask": [[True, False], [True, True]],
    }
    with pytest.raises(ValueError, match=r"1 sources and 2 targets.*; source rows \[0\] are empty"):
        encoder_decoder_batch([torch.tensor([])], targets, pad_id=0, decoder_start_id=2)


@pytest.mark.parametrize(
    "source, target, message",
    [
        ([5, 299, 6], [298, 7], "the target's sentinel 0 is number 1"),
        ([5, 299, 6, 298], [299, 7], r"the source has the gaps \[0, 1\], the target fills 1"),
        ([5, 6], [7, 299], "the target begins with 7 and not with a sentinel"),
        ([5, 299], [299, 7, 298, 8], r"gaps \[0\], the target fills 2"),
        ([5, 299, 299], [299, 7, 298], r"gaps \[0, 0\]"),
    ],
)
def test_what_does_not_fit_is_not_restored(source, target, message):
    with pytest.raises(ValueError, match=f"do not fit together: .*{message}"):
        restore_spans(torch.tensor(source), torch.tensor(target), SENTINELS)


# --- lengths


def test_text_length():
    """T5's own numbers for 512 (568 tokens of text, targets of 114), and the definition for all others."""
    assert (text_length(512), corrupted_lengths(568)) == (568, (512, 114))
    for density, mean in [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.05, 8.0)]:
        for source_length in range(3, 200):
            length = text_length(source_length, density, mean)
            assert corrupted_lengths(length, density, mean)[0] <= source_length
            longer = [corrupted_lengths(length + k, density, mean)[0] for k in range(1, 40)]
            assert min(longer) > source_length
    with pytest.raises(ValueError, match="source_length 2"):
        text_length(2)


def test_sentinels_count_down_from_the_end():
    assert sentinel_ids(32100)[0] == 32099 and sentinel_ids(32100)[-1] == 32000
    with pytest.raises(ValueError, match="101 sentinels do not fit into a vocabulary of 100"):
        sentinel_ids(100, 101)


# --- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"noise_density": 1.5, "mean_span_length": 0.5}, "noise_density=1.5: .*; mean_span_length=0.5: must be"),
        ({"noise_density": 0}, "noise_density=0"),
        ({"mean_span_length": float("nan")}, "mean_span_length=nan"),
        ({"sentinels": ()}, "at least one"),
        ({"sentinels": (299, 299)}, "different ids"),
        ({"sentinels": (300,), "eos_id": -1}, r"ids \[-1, 300\] are outside the vocabulary 0..299"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=f"SpanCorruption: .*{message}"):
        objective(**fields)


def test_wrong_rows():
    rows = torch.full((2, 40), 5)
    with pytest.raises(ValueError, match="a row of 40 tokens needs 2 sentinels and there are 1: make rows shorter"):
        objective(sentinels=(299,))(rows, rows > 0, generator())
    with pytest.raises(ValueError, match=r"the text itself holds the sentinels \[150\]"):
        objective()(rows + 145, rows > 0, generator())
    with pytest.raises(ValueError, match=r"rows \[0, 1\] are empty.*; ids \[305\] are outside"):
        objective()(rows + 300, rows < 0, generator())
    with pytest.raises(ValueError, match="not empty"):
        corrupt_spans(torch.tensor([]), torch.tensor([]), SENTINELS)
    with pytest.raises(ValueError, match="noise_density=2"):
        span_counts(10, 2)


# --- the loader


def test_a_loader_of_full_sources_resumes_exactly(tmp_path):
    """Packed windows of text_length(32) tokens: every source but the last window's has 32 tokens, none is padding."""
    tokenizer = ByteTokenizer([f"<extra_id_{i}>" for i in range(8)])
    documents = [Document(str(n), "".join(chr(33 + (n + i) % 90) for i in range(n))) for n in range(60)]
    file = write_tokens(documents, tokenizer, tmp_path / "t")
    sentinels = tuple(tokenizer.special_ids[f"<extra_id_{i}>"] for i in range(8))
    task = SpanCorruption(sentinels, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id)

    def make():
        return ObjectiveLoader(file, task, 4, text_length(32), seed=3, packed=True)

    loader = make()
    first = [next(loader) for _ in range(len(loader.rows(0)) // 4)]
    assert sum(int((~batch["source_mask"]).any(1).sum()) for batch in first) <= 1
    assert {batch["source"].shape for batch in first} == {(4, 32)}
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    for _ in range(30):
        a, b = next(loader), next(resumed)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
