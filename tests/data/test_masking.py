"""Masked language modelling against its proportions and against transformers' collator."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import Document, MaskedLanguageModeling, Objective, ObjectiveLoader, WordBoundaries, write_tokens
from minillm.data.masking import choose_tokens
from minillm.tokenizers import ByteTokenizer

VOCAB, PAD, CLS, SEP, MASK = 100, 0, 1, 2, 3
SPECIAL = (PAD, CLS, SEP, MASK)
BYTES = ByteTokenizer(["<mask>"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**fields):
    return MaskedLanguageModeling(**{"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL} | fields)


def text(rows, length, seed=1):
    """[CLS] text [SEP], with a [SEP] in the middle of each row and the last quarter of each row padding."""
    tokens = torch.randint(4, VOCAB, (rows, length), generator=generator(seed))
    real = length - length // 4
    tokens[:, 0], tokens[:, real // 2], tokens[:, real - 1], tokens[:, real:] = CLS, SEP, SEP, PAD
    return tokens, (torch.arange(length) < real).expand(rows, length)


def within_3_sigma(hits, n, p):
    return abs(hits - n * p) <= 3 * math.sqrt(n * p * (1 - p))


# --- which tokens, and what becomes of them


def test_shares_of_20000_tokens():
    tokens, mask = text(50, 540)
    batch = objective()(tokens, mask, generator())
    chosen, out = batch["labels"] != -100, batch["tokens"]
    allowed = int((mask & (tokens > MASK)).sum())
    assert allowed == 50 * (405 - 3) > 20_000
    n = int(chosen.sum())
    assert within_3_sigma(n, allowed, 0.15)
    masked, kept = (out[chosen] == MASK).sum(), (out[chosen] == tokens[chosen]).sum()
    assert within_3_sigma(int(masked), n, 0.8)
    # a random replacement is drawn from all 96 ordinary tokens, the original among them
    assert within_3_sigma(int(kept), n, 0.1 + 0.1 / 96)
    random = out[chosen & (out != MASK) & (out != tokens)]
    assert within_3_sigma(len(random), n, 0.1 * 95 / 96)
    assert random.min() >= 4 and len(random.unique()) > 80


def test_labels_are_the_text_and_nothing_else_changes():
    tokens, mask = text(8, 64)
    before = tokens.clone()
    batch = objective()(tokens, mask, generator())
    chosen = batch["labels"] != -100
    assert torch.equal(tokens, before) and torch.equal(batch["mask"], mask)
    assert torch.equal(torch.where(chosen, batch["labels"], batch["tokens"]), tokens)
    assert all(values.dtype == torch.int64 for name, values in batch.items() if name != "mask")


@given(
    rows=st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=12), min_size=1, max_size=5),
    rate=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_special_tokens_and_padding_are_never_chosen_nor_given(rows, rate, seed):
    """Any rows over 20 ids of which 0..3 are special; with rate 1 and no kept share every allowed token changes."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    task = objective(vocab_size=20, rate=rate, mask_share=0, random_share=1)
    batch = task(tokens, mask, generator(seed))
    chosen, allowed = batch["labels"] != -100, mask & (tokens > MASK)
    assert not (chosen & ~allowed).any()
    assert (batch["tokens"][chosen] > MASK).all()
    assert torch.equal(batch["tokens"][~chosen], tokens[~chosen])
    if rate:
        assert torch.equal(chosen.any(1), allowed.any(1))  # each row with text teaches something
    else:
        assert not chosen.any()
    if rate == 1:
        assert torch.equal(chosen, allowed)


def test_padding_that_is_no_special_token_is_not_chosen():
    tokens = torch.full((1, 50), 7)
    mask = torch.arange(50)[None] < 25
    chosen = objective(rate=1.0)(tokens, mask, generator())["labels"] != -100
    assert torch.equal(chosen, mask)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_share_of_short_rows(n):
    """Of n tokens one is chosen at least: on average 0.15 n + 0.85^n."""
    rows = 20_000
    chosen = choose_tokens(torch.ones(rows, n, dtype=torch.bool), generator(), 0.15).sum(1).double()
    none = 0.85**n
    mean = 0.15 * n + none
    variance = n * 0.15 * 0.85 + (0.15 * n) ** 2 + none - mean**2  # as E x^2 of a binomial, + 1 where it gave 0
    assert abs(chosen.mean() - mean) <= 3 * math.sqrt(max(variance, 0) / rows) + 1e-9


def test_the_same_generator_gives_the_same_and_another_another():
    tokens, mask = text(4, 64)
    first, same, other = (objective()(tokens, mask, generator(seed))["labels"] for seed in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)


# --- transformers


class FakeTokenizer:
    """What DataCollatorForLanguageModeling asks of a tokenizer."""

    mask_token, pad_token_id, padding_side, is_fast = "[MASK]", PAD, "right", True

    def __len__(self):
        return VOCAB

    def convert_tokens_to_ids(self, token):
        return MASK

    def get_special_tokens_mask(self, ids, already_has_special_tokens):
        return [i in SPECIAL for i in ids]


def test_equals_transformers_given_the_same_draws(monkeypatch):
    """Theirs draws: chosen?, masked?, random?, which; ours one number for chosen, one for the kind, and which."""
    from transformers import DataCollatorForLanguageModeling

    tokens, mask = text(16, 200)
    ours = objective()(tokens, mask, generator(3))
    replay = generator(3)
    choice, kind = torch.rand(tokens.shape, generator=replay), torch.rand(tokens.shape, generator=replay)
    words = 4 + torch.randint(VOCAB - 4, tokens.shape, generator=replay)
    draws = iter([choice, kind, kind - 0.8 + 0.4])  # random is 0.5 of what is left above 0.8: up to 0.9

    def bernoulli(p, generator=None):
        return (next(draws) < p).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    monkeypatch.setattr(torch, "randint", lambda *args, **named: words)
    collator = DataCollatorForLanguageModeling(FakeTokenizer(), mlm_probability=0.15)
    inputs, labels = collator.torch_mask_tokens(tokens.clone())
    assert torch.equal(ours["labels"], labels) and torch.equal(ours["tokens"], inputs)


def test_whole_words_equal_transformers_given_the_same_draws(monkeypatch):
    """Theirs knows words by the characters they touch; it masks all that are chosen."""
    from transformers import DataCollatorForLanguageModeling

    tokens, mask = text(16, 200)
    words = (torch.rand(tokens.shape, generator=generator(8)) < 0.6).cumsum(1)  # words of 1 to several tokens
    ours = objective(mask_share=1.0, random_share=0.0)(tokens, mask, generator(3), words)
    replay = generator(3)
    draws = iter([torch.rand(tokens.shape, generator=replay), torch.rand(tokens.shape, generator=replay)])
    monkeypatch.setattr(torch, "bernoulli", lambda p, generator=None: (next(draws) < p).float())
    starts = torch.arange(tokens.shape[1]) + words * 10  # a gap before every word
    special = torch.tensor([[i in SPECIAL for i in row] for row in tokens.tolist()])
    collator = DataCollatorForLanguageModeling(
        FakeTokenizer(), whole_word_mask=True, mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    inputs, labels = collator.torch_mask_tokens(tokens.clone(), special.long(), torch.stack([starts, starts + 1], -1))
    assert torch.equal(ours["labels"], labels) and torch.equal(ours["tokens"], inputs)


def test_shares_are_those_of_transformers():
    """Free draws on both sides: the counts of chosen, masked and unchanged tokens differ by at most 3 sigma."""
    from transformers import DataCollatorForLanguageModeling

    tokens, mask = text(60, 540)
    collator = DataCollatorForLanguageModeling(FakeTokenizer(), mlm_probability=0.15)
    theirs = collator.torch_mask_tokens(tokens.clone())
    ours = objective()(tokens, mask, generator())
    counts = []
    for out, labels in ((ours["tokens"], ours["labels"]), theirs):
        chosen = labels != -100
        counts.append([chosen.sum(), (chosen & (out == MASK)).sum(), (chosen & (out == tokens)).sum()])
    for a, b in zip(*counts, strict=True):
        assert abs(a - b) <= 3 * math.sqrt(a + b)


# --- whole words


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12), rate=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_whole_words_are_chosen_together(sizes, rate, seed):
    ids = torch.tensor([[i for i, size in enumerate(sizes) for _ in range(size)]])
    chosen = choose_tokens(torch.ones_like(ids, dtype=torch.bool), generator(seed), rate, ids)
    for word in range(len(sizes)):
        assert len(chosen[ids == word].unique()) == 1


def test_whole_words_keep_the_share_of_tokens():
    """Words of 1 to 9 tokens, each chosen with p = 0.15: the share's variance is p q sum(size^2) / n^2."""
    sizes = torch.randint(1, 10, (8000,), generator=generator(2))
    ids = torch.arange(8000).repeat_interleave(sizes)[None]
    chosen = choose_tokens(torch.ones_like(ids, dtype=torch.bool), generator(), 0.15, ids)
    sigma = math.sqrt(0.15 * 0.85 * sizes.square().sum())
    assert ids.numel() > 20_000 and abs(chosen.sum() - 0.15 * ids.numel()) <= 3 * sigma


def test_a_special_token_parts_words():
    """The same id on both sides of a [SEP], as a list too; over many draws the sides differ."""
    tokens, ids = torch.tensor([[7, 8, SEP, 9, 10]]), [[0, 0, 0, 0, 0]]
    seen = set()
    for seed in range(40):
        chosen = objective(rate=0.5)(tokens, tokens > 0, generator(seed), ids)["labels"][0] != -100
        assert chosen[0] == chosen[1] and chosen[3] == chosen[4] and not chosen[2]
        seen.add((bool(chosen[0]), bool(chosen[3])))
    assert seen == {(True, False), (False, True), (True, True)}


def test_word_boundaries():
    pieces = ["<s>", "▁the", "▁cat", "s", ".\n", "It", "▁"]
    words = WordBoundaries(pieces)
    assert words.word_ids(torch.tensor([[1, 2, 3, 4, 5, 6, 3], [3, 3, 1, 0, 1, 4, 4]])).tolist() == [
        [0, 1, 1, 1, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3],
    ]  # fmt: skip
    words = WordBoundaries(["[CLS]", "token", "##iza", "##tion", "helps"], marker="##")
    assert words.word_ids(torch.tensor([[0, 1, 2, 3, 4], [3, 3, 1, 1, 2]])).tolist() == [
        [0, 1, 1, 1, 2],
        [0, 0, 1, 2, 2],
    ]
    assert repr(words) != repr(WordBoundaries(["[CLS]", "##a"], marker="##"))


def test_the_objective_finds_whole_words():
    words = WordBoundaries([*"[]{}", *(f"▁{i}" if i % 3 == 0 else str(i) for i in range(96))])
    tokens = torch.arange(4, 100).repeat(30, 1)
    batch = objective(words=words)(tokens, tokens > 0, generator())
    chosen = (batch["labels"] != -100).view(30, 32, 3)
    assert torch.equal(chosen.any(2), chosen.all(2)) and chosen.any()
    masked = (batch["tokens"] == MASK).view(30, 32, 3)
    assert (masked.any(2) & ~masked.all(2)).any()  # what becomes of a token is drawn for each by itself


# --- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rate": 1.2}, r"rate=1.2: must be from 0 to 1"),
        ({"rate": -0.1, "mask_share": 2}, r"rate=-0.1: .*; mask_share=2: "),
        ({"rate": float("nan")}, "rate=nan"),
        ({"mask_share": 0.8, "random_share": 0.3}, "more than all chosen"),
        ({"mask_id": 100}, r"ids \[100\] of mask_id and special_ids are outside the vocabulary 0..99"),
        ({"special_ids": (0, -1, 200)}, r"ids \[-1, 200\]"),
        ({"special_ids": tuple(range(100))}, "all 100 ids are special"),
        ({"words": WordBoundaries(["▁a"])}, "words knows 1 pieces, vocab_size is 100"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=f"MaskedLanguageModeling: .*{message}"):
        objective(**fields)


def test_wrong_rows():
    tokens = torch.tensor([[5, 6], [100, 7]])
    with pytest.raises(ValueError, match=r"rows \[0\] are empty.*; ids \[100\] are outside the vocabulary 0..99"):
        objective()(tokens, torch.tensor([[False, False], [True, True]]), generator())
    with pytest.raises(ValueError, match=r"tokens \(2, 2\) and mask \(2, 2\) \(torch.int64\)"):
        objective()(tokens, tokens, generator())
    with pytest.raises(ValueError, match=r"rate=7: .*; word_ids are \(1, 2\), the tokens \(2, 2\)"):
        choose_tokens(tokens > 0, generator(), 7, [[0, 0]])
    with pytest.raises(ValueError, match="none of the 2 pieces begins with '##'"):
        WordBoundaries(["▁a", "b"], marker="##")
    with pytest.raises(ValueError, match="marker is"):
        WordBoundaries(["_a"], marker="_")


# --- the loader


@pytest.fixture
def corpus(tmp_path):
    """30 documents of 0, 3, 6, .. 87 bytes; the first is empty."""
    documents = [Document(str(n), "".join(chr(33 + (n + i) % 90) for i in range(3 * n))) for n in range(30)]
    return write_tokens(documents, BYTES, tmp_path / "t")


def make(corpus, **named):
    task = MaskedLanguageModeling(
        BYTES.special_ids["<mask>"], BYTES.vocab_size, tuple(BYTES.special_ids.values()), **named.pop("task", {})
    )
    return ObjectiveLoader(corpus, task, **{"batch_size": 6, "length": 20, "seed": 1} | named)


def original(batch):
    return torch.where(batch["labels"] != -100, batch["labels"], batch["tokens"])


def take(loader, n):
    return [next(loader) for _ in range(n)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_rows_are_the_documents_in_pieces(corpus):
    loader = make(corpus, shuffle=False, prefix=[BYTES.bos_id], suffix=[BYTES.eos_id])
    pieces = []
    for n in range(30):
        document = [33 + (n + i) % 90 for i in range(3 * n)]
        pieces += [[257, *document[i : i + 20], 258] for i in range(0, len(document), 20)]
    assert len(loader.rows(0)) == len(pieces)
    count = len(pieces) // 6
    rows = [row[real].tolist() for b in take(loader, count) for row, real in zip(original(b), b["mask"], strict=True)]
    assert rows == pieces[: 6 * count]


def test_packed_rows_are_the_corpus_in_windows(corpus):
    loader = make(corpus, batch_size=1, packed=True, shuffle=False)
    stream = [int(i) for i in corpus.tokens]
    batches = take(loader, len(loader.rows(0)))
    assert [i for b in batches for i in original(b)[b["mask"]].tolist()] == stream
    assert all(b["tokens"].shape == (1, 20) for b in batches[:-1])
    assert not any((b["labels"] == BYTES.eos_id).any() for b in batches)


@pytest.mark.parametrize("packed", [False, True])
def test_one_pass_is_every_row_once_and_always_alike(corpus, packed):
    loader = make(corpus, packed=packed)
    before = [batch["labels"] for batch in loader.one_pass(7)]
    assert [len(labels) for labels in before] == [7] * (len(loader.begins) // 7) + [len(loader.begins) % 7]
    take(loader, 30)  # into another epoch
    after = list(loader.one_pass(7))
    assert all(torch.equal(labels, batch["labels"]) for labels, batch in zip(before, after, strict=True))
    texts = [torch.where(batch["labels"] == -100, batch["tokens"], batch["labels"])[batch["mask"]] for batch in after]
    ends = corpus.ends - (0 if packed else 1)  # alone, a document is without its end of text
    whole = np.concatenate([corpus.tokens[start:end] for start, end in zip(corpus.starts, ends, strict=True)])
    assert torch.cat(texts).tolist() == whole.tolist()


def test_masks_are_drawn_anew_in_every_epoch(corpus):
    loader = make(corpus, shuffle=False, batch_size=1, length=100)
    epochs = [take(loader, 29) for _ in range(3)]
    for batches in zip(*epochs, strict=True):
        assert same(*({"text": original(b)} for b in batches[:2]))
    longest = [epoch[-1]["labels"] for epoch in epochs]
    assert not torch.equal(longest[0], longest[1]) and not torch.equal(longest[1], longest[2])


@pytest.mark.parametrize("steps", [0, 1, 23, 40])
def test_resume_is_exact_also_with_another_world_size(corpus, steps):
    loader = make(corpus)
    take(loader, steps)
    state = json.loads(json.dumps(loader.state_dict()))
    after = take(loader, 30)
    resumed, half = make(corpus), make(corpus, rank=1, world_size=2)
    resumed.load_state_dict(state)
    half.load_state_dict(state)
    for batch, again, part in zip(after, take(resumed, 30), take(half, 30), strict=True):
        assert same(batch, again)
        assert same({name: values[1::2] for name, values in batch.items()}, part)


def test_state_of_another_objective_is_refused(corpus):
    words = WordBoundaries(["▁"] * BYTES.vocab_size)
    for fields in ({"rate": 0.3}, {"words": words}):
        with pytest.raises(ValueError, match=r"objective: saved .*rate=0.15.*, now .*MaskedLanguageModeling"):
            make(corpus, task=fields).load_state_dict(make(corpus).state_dict())
    for named in ({"packed": True}, {"prefix": [5]}, {"suffix": [5]}):
        with pytest.raises(ValueError, match=f"{next(iter(named))}: saved"):
            make(corpus, **named).load_state_dict(make(corpus).state_dict())


def test_an_objective_must_say_what_it_does(corpus):
    class Nameless(Objective):
        def __call__(self, tokens, mask, generator):
            return {"tokens": tokens}

    with pytest.raises(ValueError, match="frozen dataclass"):
        ObjectiveLoader(corpus, Nameless(), 2, 8)
