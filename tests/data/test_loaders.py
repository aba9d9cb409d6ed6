"""Token files and loaders against numpy slicing by hand."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import Document, PackedLoader, PaddedLoader, TokenFile, sequential_batches, write_tokens
from minillm.tokenizers import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()
EOS, PAD = BYTES.eos_id, BYTES.pad_id
PLAIN = [Document("a", "abcd"), Document("b", "é"), Document("c", "efghijkl")]
PAIRS = [Document("p", "2+2=", "4"), Document("q", "", "xy"), Document("r", "say:", ""), Document("s", "plain")]


@pytest.fixture
def plain(tmp_path):
    return write_tokens(PLAIN, BYTES, tmp_path / "plain")


@pytest.fixture
def pairs(tmp_path):
    return write_tokens(PAIRS, BYTES, tmp_path / "pairs")


@pytest.fixture
def long(tmp_path):
    """40 documents of 1..40 different characters: no token stands twice, so a token names its place."""
    letters = iter(chr(0x4E00 + i) for i in range(820))
    documents = [Document(str(n), "".join(next(letters) for _ in range(n))) for n in range(1, 41)]
    return write_tokens(documents, CharTokenizer.train(d.text for d in documents), tmp_path / "long")


def stream(token_file):
    return np.asarray(token_file.tokens).astype(int).tolist()


def take(loader, n):
    return [next(loader) for _ in range(n)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- token files


def test_tokens_are_documents_closed_by_end_of_text(plain):
    assert stream(plain) == [*b"abcd", EOS, *"é".encode(), EOS, *b"efghijkl", EOS]
    assert plain.tokens.dtype == np.uint16
    assert plain.starts.tolist() == plain.counted.tolist() == [0, 5, 8]
    assert plain.ends.tolist() == [5, 8, 17]
    meta = plain.meta
    assert (len(plain), meta.num_documents, meta.characters, meta.bytes, meta.counted_bytes) == (17, 3, 13, 14, 14)
    assert (meta.vocab_size, meta.pad_id, meta.tokenizer_fingerprint) == (259, PAD, BYTES.fingerprint)


def test_prompts_are_stored_but_not_counted(pairs):
    assert stream(pairs) == [*b"2+2=4", EOS, *b"xy", EOS, *b"say:", EOS, *b"plain", EOS]
    assert pairs.starts.tolist() == [0, 6, 9, 14]
    assert pairs.counted.tolist() == [4, 6, 13, 14]
    assert (pairs.meta.bytes, pairs.meta.counted_bytes) == (16, 8)


@pytest.mark.parametrize("size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_dtype_holds_the_largest_id(tmp_path, size, dtype):
    alphabet = "".join(chr(c) for c in range(0x10000, 0x10000 + size - 4))
    file = write_tokens([Document("a", alphabet[-1] * 2)], CharTokenizer(alphabet), tmp_path / "t")
    assert file.meta.dtype == dtype and stream(file) == [size - 1, size - 1, 3]


def test_documents_are_streamed(tmp_path):
    """A generator is enough: the corpus need not be a list."""
    file = write_tokens((Document(str(i), "ab") for i in range(1000)), BYTES, tmp_path / "t")
    assert len(file) == 3000 and TokenFile.open(tmp_path / "t", verify=True).ends.tolist() == list(range(3, 3001, 3))


@pytest.mark.parametrize("documents", [[], [Document("a", "")], [Document("a", "x")]])
def test_empty_or_one_token_corpus(tmp_path, documents):
    with pytest.raises(ValueError, match=r"the corpus has [01] tokens in [01] documents; .* at least 2 are needed"):
        write_tokens(documents, BYTES, tmp_path / "t")
    assert not (tmp_path / "t").exists() and list(tmp_path.iterdir()) == []


def test_only_a_token_file_is_replaced(tmp_path, plain):
    assert len(write_tokens(PAIRS, BYTES, plain.folder)) == 20
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine holds other files and no token file"):
        write_tokens(PLAIN, BYTES, tmp_path / "mine")


def test_damaged_files(plain):
    folder = plain.folder
    tokens, documents, meta = ((folder / name).read_bytes() for name in ["tokens.bin", "documents.bin", "meta.json"])
    (folder / "tokens.bin").write_bytes(tokens[:-1])
    (folder / "documents.bin").unlink()
    with pytest.raises(ValueError, match=r"damaged: tokens.bin has 33 bytes instead of 34; documents.bin is missing"):
        TokenFile.open(folder)
    (folder / "tokens.bin").write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
    (folder / "documents.bin").write_bytes(documents)
    TokenFile.open(folder)
    with pytest.raises(ValueError, match=r"damaged: tokens.bin has the right size but other content"):
        TokenFile.open(folder, verify=True)
    for change, message in [
        ({"format_version": 7}, "token file version 7, this minillm reads 1"),
        ({"dtype": "float64"}, "is damaged, write the token file again: .*dtype"),
        ({"num_tokens": "many", "extra": 1}, "is damaged, write the token file again: .*"),
    ]:
        (folder / "meta.json").write_text(json.dumps({**json.loads(meta), **change}))
        with pytest.raises(ValueError, match=message):
            TokenFile.open(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"meta\.json does not exist"):
        TokenFile.open(folder)


# --- packed windows


def test_packed_windows_by_hand(plain):
    """17 tokens, 16 targets: windows of 6 begin at 0, 6, 12; the last one has 4 targets and 2 paddings."""
    t = stream(plain)
    batch = next(PackedLoader(plain, 3, 6, shuffle=False))
    assert batch["tokens"].tolist() == [t[0:6], t[6:12], [*t[12:16], PAD, PAD]]
    assert batch["labels"].tolist() == [t[1:7], t[7:13], [*t[13:17], -100, -100]]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64 and batch.keys() == {"tokens", "labels"}


def test_isolated_documents_by_hand(plain):
    """Places 0-4 are document 0, 5-7 are 1, 8-16 are 2; the label that would be a document's first token is -100."""
    t = stream(plain)
    batch = next(PackedLoader(plain, 2, 9, shuffle=False, isolate_documents=True))
    assert batch["labels"].tolist() == [[*t[1:5], -100, *t[6:8], -100, t[9]], [*t[10:17], -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 0, 0]]
    documents = [[0] * 5 + [1] * 3 + [2], [2] * 7 + [-1] * 2]
    assert batch["mask"].tolist() == [[[a == b for b in row] for a in row] for row in documents]


def test_padding_belongs_to_no_document(tmp_path):
    file = write_tokens([Document("a", "xy")], BYTES, tmp_path / "t")
    batch = next(PackedLoader(file, 1, 3, isolate_documents=True))  # inputs x y PAD
    assert batch["mask"].tolist() == [[[True, True, False], [True, True, False], [False, False, True]]]


def test_prompts_have_no_labels(pairs):
    """The targets that count are 4 EOS | x y EOS | EOS | p l a i n EOS, isolated the same without x and p."""
    for isolate, expected in [(False, [*b"4", EOS, *b"xy", EOS, EOS, *b"plain", EOS]),
                              (True, [*b"4", EOS, *b"y", EOS, EOS, *b"lain", EOS])]:  # fmt: skip
        [batch] = sequential_batches(pairs, 9, 4, isolate_documents=isolate)
        assert [i for i in batch["labels"].flatten().tolist() if i != -100] == expected


def labels_of_epoch(loader, epoch=0):
    seen = []
    for row in loader.rows(epoch):
        seen += loader.batch(np.array([row]), slice(None))["labels"].flatten().tolist()
    return sorted(i for i in seen if i != -100)


@settings(deadline=None)
@given(length=st.integers(1, 900), isolate=st.booleans(), offset=st.booleans(), epoch=st.integers(0, 9), data=st.data())
def test_every_token_is_a_label_once(tmp_path_factory, length, isolate, offset, epoch, data):
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=2, max_size=20))
    letters = "".join(chr(0x4E00 + i) for i in range(sum(sizes)))
    cuts = np.cumsum([0, *sizes]).tolist()
    documents = [Document(str(i), letters[a:b]) for i, (a, b) in enumerate(pairwise(cuts))]
    file = write_tokens(documents, CharTokenizer(letters), tmp_path_factory.mktemp("t") / "t")
    loader = PackedLoader(file, 1, length, 3, isolate_documents=isolate, random_offset=offset)
    never = file.starts.tolist() if isolate else [0]
    expected = sorted(token for place, token in enumerate(stream(file)) if place not in never)
    assert labels_of_epoch(loader, epoch) == expected
    if not offset:
        batches = sequential_batches(file, 3, length, isolate_documents=isolate)
        seen = [i for batch in batches for i in batch["labels"].flatten().tolist() if i != -100]
        assert sorted(seen) == expected


def test_offset_moves_the_cuts(long):
    loader = PackedLoader(long, 2, 32, random_offset=True)
    assert len({int(loader.rows(epoch)[0]) for epoch in range(10)}) > 5
    assert same(next(loader), next(PackedLoader(long, 2, 32, random_offset=True)))


def test_batch_larger_than_a_later_epoch(tmp_path):
    """With a moved cut an epoch may have one window more than the next; batches stay full."""
    file = write_tokens([Document("a", "x" * 12)], BYTES, tmp_path / "t")  # 12 targets: 4 windows of 3, or 5 when moved
    loaders = [PackedLoader(file, 4, 3, seed, random_offset=True) for seed in range(9)]
    five = next(loader.seed for loader in loaders if len(loader.rows(0)) == 5 > len(loader.rows(1)))
    for batch in take(PackedLoader(file, 5, 3, five, random_offset=True), 10):
        assert batch["tokens"].shape == (5, 3)


def test_epochs_are_shuffled_differently_and_follow_without_gap(long):
    """859 targets in windows of 10 are 86 rows; 43 batches of 4 are two epochs."""
    loader = PackedLoader(long, 4, 10, seed=1)
    rows = torch.cat([batch["tokens"] for batch in take(loader, 43)])[:, 0].tolist()
    assert sorted(rows[:86]) == sorted(rows[86:]) == sorted(stream(long)[i] for i in range(0, 859, 10))
    assert rows[:86] != rows[86:] and rows[:86] != sorted(rows[:86])
    assert not same(next(PackedLoader(long, 4, 10, seed=2)), next(PackedLoader(long, 4, 10, seed=1)))


LOADERS = {
    "packed": lambda file, **k: PackedLoader(file, 6, 16, 1, isolate_documents=True, random_offset=True, **k),
    "right": lambda file, **k: PaddedLoader(file, 6, 41, 1, padding="right", **k),
    "left": lambda file, **k: PaddedLoader(file, 6, 41, 1, padding="left", **k),
}
EVERY = pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)


@EVERY
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_see_what_one_process_sees(long, make, world_size):
    whole = take(make(long), 30)
    parts = [take(make(long, rank=rank, world_size=world_size), 30) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            merged = torch.stack([part[step][key] for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(merged, value)


@EVERY
@pytest.mark.parametrize("steps", [0, 1, 7, 25])
def test_resume_is_exact_also_with_another_world_size(long, make, steps):
    loader = make(long)
    take(loader, steps)
    state = json.loads(json.dumps(loader.state_dict()))
    after = take(loader, 12)
    resumed = make(long)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(after, take(resumed, 12), strict=True))
    half = make(long, rank=1, world_size=2)
    half.load_state_dict(state)
    assert torch.equal(next(half)["tokens"], after[0]["tokens"][1::2])


def test_state_of_other_data_or_settings_is_refused(long, plain):
    state = PackedLoader(long, 4, 8, seed=1).state_dict()
    with pytest.raises(ValueError, match="cannot continue") as error:
        PackedLoader(plain, 2, 6, seed=2, isolate_documents=True).load_state_dict(state)
    for line in [
        "batch_size: saved 4, now 2", "length: saved 8, now 6", "seed: saved 1, now 2", "tokens_sha256: saved",
        "isolate_documents: saved False, now True",
    ]:  # fmt: skip
        assert line in str(error.value)
    with pytest.raises(ValueError, match="loader: saved 'PackedLoader', now 'PaddedLoader'"):
        PaddedLoader(long, 4, 41).load_state_dict(state)


def test_wrong_arguments(plain):
    with pytest.raises(ValueError, match=r"length 0 is not.*batch_size 3 .* by world_size 2; rank 2 is not.*seed=-1"):
        PackedLoader(plain, 3, 0, seed=-1, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"has 3 rows of length 6 \(17 tokens, 3 documents\), fewer than batch_size 4"):
        PackedLoader(plain, 4, 6)
    with pytest.raises(ValueError, match="padding is 'left' or 'right', got 'middle'"):
        PaddedLoader(plain, 1, 9, padding="middle")
    with pytest.raises(ValueError, match="batch_size 0 and length 4 must be positive"):
        next(sequential_batches(plain, 0, 4))


# --- one document a row


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_rows_by_hand(pairs, padding):
    """Rows are the documents without their last token as inputs, without their first as labels, prompts at -100."""
    batch = next(PaddedLoader(pairs, 4, 9, shuffle=False, padding=padding))
    rows = [(b"2+2=4", [-100] * 3 + [*b"4", EOS]), (b"xy", [*b"y", EOS]), (b"say:", [-100] * 3 + [EOS]),
            (b"plain", [*b"lain", EOS])]  # fmt: skip

    def fill(values, by):
        missing = [by] * (5 - len(values))
        return [*values, *missing] if padding == "right" else [*missing, *values]

    assert batch["tokens"].tolist() == [fill([*inputs], PAD) for inputs, _ in rows]
    assert batch["labels"].tolist() == [fill(labels, -100) for _, labels in rows]
    assert batch["mask"].tolist() == [fill([True] * len(inputs), False) for inputs, _ in rows]


def test_truncation_is_reported(long, pairs):
    with pytest.warns(UserWarning, match=r"30 of 40 documents .* length 10: 465 of 860 tokens .*longest: 40"):
        loader = PaddedLoader(long, 40, 10, shuffle=False)
    batch = next(loader)  # 1 + 2 + .. + 30 = 465 tokens over
    assert batch["tokens"].shape == (40, 10)
    assert batch["labels"][-1].tolist() == stream(long)[-40:-30]
    with pytest.raises(ValueError, match=r"2 of 4 .* no label within length 3 .*numbers: \[0, 2\].* 4 tokens"):
        PaddedLoader(pairs, 2, 3)


def test_windows_without_a_label_are_left_out(tmp_path):
    """Two documents: a prompt of 20 bytes and 1 to learn, then the same; each + end of text. Windows of 4."""
    documents = [Document(name, "p" * 20, "c") for name in "ab"]
    file = write_tokens(documents, ByteTokenizer(), tmp_path / "tokens")
    loader = PackedLoader(file, batch_size=1, length=4, shuffle=False)
    assert loader.rows(0).tolist() == [16, 20, 40]  # labels stand at 20, 21, 42 and 43
    labels = [batch["labels"][batch["labels"] != -100].tolist() for batch in (next(loader) for _ in range(3))]
    assert labels == [[ord("c")], [258], [ord("c"), 258]]
    assert len(list(sequential_batches(file, 1, 4))) == 3
