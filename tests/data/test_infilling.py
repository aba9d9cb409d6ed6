"""BART's noise against its definition: what is gone, what stays, and how often."""

import json
import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import Document, ObjectiveLoader, Sentences, TextInfilling, sentence_groups, write_tokens
from minillm.data.infilling import infill, permute_sentences
from minillm.tokenizers import ByteTokenizer

VOCAB, PAD, BOS, EOS, MASK, STOP = 100, 0, 1, 2, 3, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**fields):
    settings = {"mask_id": MASK, "vocab_size": VOCAB, "eos_id": EOS, "pad_id": PAD}
    return TextInfilling(**settings | {"decoder_start_id": EOS} | fields)


def gaps(source, n):
    """What each mask of a source of the text 10, 11, .., 9 + n stands for, read off the tokens around it.

    Where masks touch, only their sum is known: (tokens gone, masks).
    """
    found, last, masks = [], 9, 0
    for token in [*source, 10 + n]:
        if token == MASK:
            masks += 1
            continue
        assert token > last  # kept tokens stay in order
        if masks:
            found.append((token - last - 1, masks))
        else:
            assert token == last + 1  # nothing is gone without a mask
        last, masks = token, 0
    return found


# --- spans


@given(n=st.integers(1, 200), rate=st.floats(0, 1), mean=st.floats(1, 10), seed=st.integers(0, 999))
def test_masks_stand_for_what_is_gone(n, rate, mean, seed):
    row = torch.arange(10, 10 + n)
    source = infill(row, generator(seed), mask_id=MASK, rate=rate, mean_span_length=mean)
    gone = sum(tokens for tokens, _ in gaps(source.tolist(), n))
    assert gone == n - (source != MASK).sum() == math.ceil(round(rate * n, 9))
    assert row.tolist() == list(range(10, 10 + n))


def test_share_of_20000_tokens():
    source = infill(torch.arange(10, 20_010), generator(), mask_id=MASK)
    assert (source != MASK).sum() == 14_000


def test_span_lengths_are_poisson():
    """Spans between kept tokens, in 60 texts of 2000: the share of each length within 3 sigma of 3^k e^-3 / k!.

    A span that touches another is left out whatever its length, so the shares are not changed by that.
    """
    lengths = Counter()
    for seed in range(60):
        source = infill(torch.arange(10, 2010), generator(seed), mask_id=MASK)
        lengths.update(tokens for tokens, masks in gaps(source.tolist(), 2000) if masks == 1)
    total = sum(lengths.values())
    assert total > 7000
    for k in range(9):
        p = 3**k * math.exp(-3) / math.factorial(k)
        assert abs(lengths[k] - total * p) <= 3 * math.sqrt(total * p * (1 - p)), k


def test_all_places_are_equally_likely():
    """One token of 5 is gone, each as often; empty spans come before the one that takes it."""
    hits, masks = Counter(), Counter()
    source = generator()
    for _ in range(6000):
        out = infill(torch.arange(10, 15), source, mask_id=MASK, rate=0.2, mean_span_length=1.0).tolist()
        hits[({*range(10, 15)} - {*out}).pop()] += 1
        masks[out.count(MASK) - 1] += 1
    assert all(abs(hits[i] - 1200) <= 3 * math.sqrt(6000 * 0.2 * 0.8) for i in range(10, 15))
    for empty in range(3):  # empty spans before the first that is not: each with p = e^-1
        p = math.exp(-empty) * (1 - math.exp(-1))
        assert abs(masks[empty] - 6000 * p) <= 3 * math.sqrt(6000 * p * (1 - p))


# --- sentences


@given(row=st.lists(st.integers(4, 9), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_sentences_stay_whole(row, seed):
    """Token 4 ends a sentence; what follows the last 4 is a sentence too."""
    found = permute_sentences(torch.tensor(row), generator(seed), [STOP]).tolist()
    assert Counter(found) == Counter(row)
    sentences, now = [], []
    for token in row:
        now.append(token)
        if token == STOP:
            sentences, now = [*sentences, now], []
    sentences += [now] if now else []
    if len(sentences) < 7:
        assert found in [[token for sentence in order for token in sentence] for order in permutations(sentences)]


def test_orders_are_equally_likely():
    """Three sentences, 6 orders; chi-square with 5 degrees of freedom."""
    row, source = torch.tensor([10, STOP, 11, 12, STOP, 13]), generator()
    counts = Counter(tuple(permute_sentences(row, source, [STOP]).tolist()) for _ in range(6000))
    assert len(counts) == 6 and sum((n - 1000) ** 2 / 1000 for n in counts.values()) <= 5 + 3 * math.sqrt(10)


# --- the batch


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=40), min_size=1, max_size=4),
    bos=st.sampled_from([None, BOS]),
    language=st.sampled_from([None, 7]),
    seed=st.integers(0, 99),
)
def test_the_labels_are_the_text(rows, bos, language, seed):
    width = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    start = {"decoder_start_id": EOS} if language is None else {"decoder_start_id": None, "language_id": language}
    batch = objective(bos_id=bos, sentence_ends=(5,), **start)(tokens, mask, generator(seed))
    front = [] if bos is None else [bos]
    for i, row in enumerate(rows):
        labels = batch["labels"][i][batch["mask"][i]].tolist()
        assert labels == [*front, *row, EOS]
        assert batch["tokens"][i][batch["mask"][i]].tolist() == [EOS if language is None else language, *labels[:-1]]
        source = batch["source"][i][batch["source_mask"][i]].tolist()
        tail = [EOS] if language is None else [EOS, language]
        assert source[: len(front)] == front and source[-len(tail) :] == tail
        noised = source[len(front) : -len(tail)]
        assert MASK in noised and not Counter(t for t in noised if t != MASK) - Counter(row)
    assert torch.equal(batch["labels"] == -100, ~batch["mask"])


def test_sentences_are_permuted_in_the_source():
    row = torch.tensor([[10, STOP, 20, STOP, 30, STOP, 40, STOP]])
    orders = {tuple(objective(rate=0, sentence_ends=(STOP,))(row, row > 0, generator(seed))["source"][0].tolist())
              for seed in range(99)}  # fmt: skip
    assert len(orders) == 24
    assert objective(rate=0)(row, row > 0, generator())["source"].tolist() == [[*row[0].tolist(), EOS]]


# --- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rate": 1.1, "mean_span_length": 0}, "rate=1.1: must be from 0 to 1; mean_span_length=0: must be at least 1"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"decoder_start_id": None}, "give either decoder_start_id or language_id"),
        ({"language_id": 7}, "give either decoder_start_id or language_id"),
        ({"mask_id": 100, "sentence_ends": (-2, 5)}, r"ids \[-2, 100\] are outside the vocabulary 0..99"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=f"TextInfilling: .*{message}"):
        objective(**fields)


def test_wrong_rows():
    rows = torch.tensor([[5, 6], [100, 7]])
    with pytest.raises(ValueError, match=r"TextInfilling: rows \[0\] are empty.*ids \[100\] are outside"):
        objective()(rows, torch.tensor([[False, False], [True, True]]), generator())
    with pytest.raises(ValueError, match=r"infill: rate=-1: .*; the row is"):
        infill(torch.tensor([], dtype=torch.int64), generator(), mask_id=MASK, rate=-1)
    with pytest.raises(ValueError, match="permute_sentences: the row is"):
        permute_sentences(torch.tensor([], dtype=torch.int64), generator(), [STOP])


# --- loaders


@pytest.mark.parametrize("name", ["infilling", "sentences"])
def test_loader_resumes_exactly(tmp_path, name):
    tokenizer = ByteTokenizer(["<mask>"])
    file = write_tokens([Document(str(n), "a. b c d. " * n) for n in range(1, 30)], tokenizer, tmp_path / "t")
    tasks = {
        "infilling": TextInfilling(
            tokenizer.special_ids["<mask>"], tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_id,
            sentence_ends=(ord("."),),
        ),
        "sentences": Sentences(),
    }  # fmt: skip
    loader, resumed = (ObjectiveLoader(file, tasks[name], 4, 64, seed=3) for _ in range(2))
    for _ in range(17):
        next(loader)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for _ in range(30):
        a, b = next(loader), next(resumed)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_sentence_groups_by_hand():
    batch = sentence_groups([([5, 6], [7]), ([8], [9, 10])], pad_id=0)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "tokens": [[5, 6], [8, 0]], "mask": [[True, True], [True, False]],
        "positives": [[7, 0], [9, 10]], "positives_mask": [[True, False], [True, True]],
    }  # fmt: skip
    triples = sentence_groups([([5], [6], [7, 8])], pad_id=0)
    assert triples["negatives"].tolist() == [[7, 8]] and triples["negatives_mask"].tolist() == [[True, True]]
    with pytest.raises(ValueError, match=r"got sizes \[2, 3\]"):
        sentence_groups([([5], [6]), ([5], [6], [7])], pad_id=0)
    with pytest.raises(ValueError, match=r"groups \[1\] hold an empty sentence"):
        sentence_groups([([5], [6]), ([5], [])], pad_id=0)
