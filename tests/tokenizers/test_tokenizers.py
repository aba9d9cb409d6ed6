"""Every tokenizer: exact round trip, no special tokens from text, streaming, saving."""

import json
import string

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    check_same,
    load_tokenizer,
)

CODE = "def area(radius):\n    if radius < 0:\n        raise ValueError('negative')\n\n    return 3.14 * radius ** 2\n"
CORPUS = [CODE * 3, "Čez cesto je šla žaba.\n\nThe quick brown fox\tjumps. <s> and </s> are words here.\n" * 5] * 4
NASTY = ["▁", "a▁▁b\n▁", "<s></s><pad><unk><0x41>", "\0", "\r", "\r\n", "a\rb", "\t\t", "   ", "\n\n\n",
         "e\u0301", "\ufeff", "👩‍👩‍👧", "🇸🇮", " ⁇ ", "▅", "\uffff", "\ue000", "\u2028", "\x85", "ﬁ", "½", "",
         "    x\n      y\n"]  # fmt: skip

BPE = SentencePieceTokenizer.train(CORPUS, 400, special_symbols=["<|user|>"])
UNIGRAM = SentencePieceTokenizer.train(CORPUS, 310, "unigram", special_symbols=["<|user|>"])
BYTES = ByteTokenizer(["<|user|>"])
CHARS = CharTokenizer.train(CORPUS, ["<|user|>"])
LOSSLESS = pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM, BYTES], ids=["bpe", "unigram", "bytes"])
EVERY = pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM, BYTES, CHARS], ids=["bpe", "unigram", "bytes", "chars"])

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.lists(st.sampled_from([*NASTY, "x", " ", "def", "\n", ":\n", ")", "é"]), max_size=12).map("".join)


@LOSSLESS
@settings(max_examples=300, deadline=None)
@given(text=any_text | tricky)
@example(text="".join(NASTY))
def test_text_comes_back_exactly_and_never_as_a_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.pieces(text) == [tokenizer.id_to_piece(i) for i in ids]


@pytest.mark.parametrize("text", NASTY)
@LOSSLESS
def test_nasty_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@EVERY
def test_special_names_in_text_are_only_text(tokenizer):
    text = "<pad> <s> </s> <|user|>"
    assert set(text.split()) <= set(tokenizer.special_ids)
    assert not set(tokenizer.encode(text)) & (set(tokenizer.special_ids.values()) - {tokenizer.unk_id})
    assert tokenizer.decode(tokenizer.special_ids[name] for name in ["<s>", "<pad>", "</s>"]) == ""


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM], ids=["bpe", "unigram"])
@given(text=tricky)
def test_ids_are_those_of_the_library(tokenizer, text):
    """The library sees the whole text at once, we go line by line; only U+2581 is spelled by us."""
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    text = text.replace("▁", "_")
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))


def test_a_whole_corpus_gives_the_ids_of_the_library():
    text = "".join(CORPUS)
    assert BPE.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=BPE.model).encode(text)
    assert any(piece.endswith(":\n") for piece in BPE.pieces(text)), "newlines should take part in pieces"
    assert "▁▁▁▁" in BPE.pieces(text), "indentation should be one piece"


def test_bytes_are_utf8():
    assert BYTES.encode("aé🙂") == list("aé🙂".encode())
    assert BYTES.pieces("a\n") == ["a", "<0x0A>"]
    assert (BYTES.vocab_size, BYTES.special_ids["<|user|>"]) == (260, 259)


def test_characters_by_hand():
    """Ids 0..3 are specials, then a, b, c in code point order; z is unknown."""
    tokenizer = CharTokenizer.train(["cab", "b"])
    assert tokenizer.encode("abcz") == [4, 5, 6, 1]
    assert tokenizer.decode([4, 5, 6, 1, 3]) == "abc\N{REPLACEMENT CHARACTER}"
    assert tokenizer.pieces("az") == ["a", "<unk>"]


@EVERY
@given(data=st.data())
def test_stream_concatenates_to_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = StreamDecoder(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@LOSSLESS
@given(text=tricky)
def test_stream_never_shows_half_a_character(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) == text and stream.flush() == ""


def test_stream_holds_back_half_a_character():
    stream = StreamDecoder(BYTES)
    assert [stream.push(b) for b in "é".encode()] == ["", "é"]
    assert stream.push(0xC3) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="id 260 is outside the vocabulary of 260 ids"):
        stream.push(260)


@EVERY
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    assert loaded.special_ids == tokenizer.special_ids
    names = ["vocab_size", "bos_id", "eos_id", "pad_id", "unk_id"]
    assert [getattr(loaded, n) for n in names] == [getattr(tokenizer, n) for n in names]


def test_training_twice_gives_the_same_fingerprint_and_other_settings_another_one():
    assert SentencePieceTokenizer.train(CORPUS, 400, special_symbols=["<|user|>"]).model == BPE.model
    others = [BPE, UNIGRAM, BYTES, CHARS, ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("ba")]
    assert len({t.fingerprint for t in others}) == len(others)


def test_another_tokenizer_is_refused():
    check_same(BYTES.fingerprint, BYTES, "runs/x")
    with pytest.raises(ValueError, match="runs/x: use the model's tokenizer!") as error:
        check_same(BPE.fingerprint, BYTES, "runs/x")
    assert BPE.fingerprint in str(error.value) and BYTES.fingerprint in str(error.value)


@EVERY
def test_ids_out_of_range(tokenizer):
    with pytest.raises(ValueError, match=rf"2 different ids .*\[-1, 9999\].*0\.\.{tokenizer.vocab_size - 1}"):
        tokenizer.decode([5, -1, 9999])


@EVERY
def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 of the text is .* half of a surrogate pair"):
        tokenizer.encode("ab\ud800")


def test_printable_ascii_has_short_pieces():
    assert all(len(BPE.encode(c)) == 1 for c in string.printable)


@EVERY
def test_inputs_of_our_own_models(tokenizer):
    """`<s> a </s>` and `<s> a </s> b </s>`, where the second text has type 1."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.with_specials([7, 8]) == ([bos, 7, 8, eos], [0, 0, 0, 0])
    assert tokenizer.with_specials([7, 8], [9]) == ([bos, 7, 8, eos, 9, eos], [0, 0, 0, 0, 1, 1])
    assert tokenizer.with_specials([], []) == ([bos, eos, eos], [0, 0, 1])
    assert tokenizer.mask_id is None and tokenizer.roles["eos"] == "</s>" and not tokenizer.leading_space


def test_mask_is_a_special_symbol():
    tokenizer = ByteTokenizer(["<mask>"])
    assert tokenizer.mask_id == tokenizer.special_ids["<mask>"] == 259


@LOSSLESS
def test_words_by_hand(tokenizer):
    """A word starts after white space; a special token belongs to none, and ends one."""
    text = "The fox\nČez cesto"
    ids = tokenizer.encode(text)
    found = {}
    for token, word in zip(ids, tokenizer.word_ids(ids), strict=True):
        found[word] = found.get(word, b"") + tokenizer.token_bytes(token)
    assert b"".join(found.values()).decode() == text
    assert [word.split() for word in found.values() if word.strip()] == [[w.encode()] for w in text.split()]
    assert not any(b"\n" in word and word.strip() and not word.endswith(b"\n") for word in found.values())
    a, eos = tokenizer.encode("a")[0], tokenizer.eos_id
    assert tokenizer.word_ids([eos, a, eos, a, a]) == [None, 0, None, 1, 1]
    ids, at = tokenizer.encode_words(text.split())
    assert tokenizer.decode(ids) == " ".join(text.split()) and sorted(set(at)) == [0, 1, 2, 3]


# --- bad training input


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabulary_larger_than_the_corpus_supports(kind):
    with pytest.raises(ValueError, match=r"5000 is more than this corpus supports.*Set vocab_size=\d+") as error:
        SentencePieceTokenizer.train(CORPUS, 5000, kind)
    most = int(str(error.value).split("Set vocab_size=")[1].split()[0])
    assert SentencePieceTokenizer.train(CORPUS, most, kind).vocab_size == most


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="vocab_size 260 leaves no room: 256 bytes and the specials take 260"):
        SentencePieceTokenizer.train(CORPUS, 260)
    with pytest.raises(ValueError, match=r"vocab_size 270 is too small: .* need \d+\. Set vocab_size above"):
        SentencePieceTokenizer.train(CORPUS, 270)


@pytest.mark.parametrize("texts", [[], [""], ["", "\n\n"]])
def test_empty_corpus(texts):
    with pytest.raises(ValueError, match="the corpus is empty"):
        SentencePieceTokenizer.train(texts, 300)
    if not any(texts):
        with pytest.raises(ValueError, match="the corpus is empty"):
            CharTokenizer.train(texts)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="got one str: pass"):
        SentencePieceTokenizer.train("hello", 300)
    with pytest.raises(ValueError, match="got one str: pass"):
        CharTokenizer.train("hello")
    with pytest.raises(ValueError, match="kind is 'bpe' or 'unigram', got 'wordpiece'"):
        SentencePieceTokenizer.train(CORPUS, 300, "wordpiece")
    with pytest.raises(ValueError, match=r"wrong: \['', '</s>'\]"):
        ByteTokenizer(["</s>", ""])
    with pytest.raises(ValueError, match="single string '<x>'"):
        ByteTokenizer("<x>")
    with pytest.raises(ValueError, match="different single characters"):
        CharTokenizer(["a", "bc"])
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        SentencePieceTokenizer.train(["ab\ud800"], 300)


def test_training_is_silent(capfd):
    SentencePieceTokenizer.train(CORPUS, 320)
    with pytest.raises(ValueError):
        SentencePieceTokenizer.train(CORPUS, 5000)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_long_line_is_not_skipped():
    """One line of 200,000 characters is over sentencepiece's limit for a sentence; its word must still be learned."""
    tokenizer = SentencePieceTokenizer.train(["abracadabra " * 17_000], 290)
    assert tokenizer.pieces("abracadabra") == ["abracadabra"] or len(tokenizer.pieces(" abracadabra")) == 1


# --- bad files


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"lacks \['fingerprint', 'format_version', 'kind'\]"):
        load_tokenizer(tmp_path)
    for change, message in [({"format_version": 9}, "format version 9"), ({"kind": "words"}, "of kind 'words', known")]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"fingerprint": "0", **BYTES.description(), **change}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_every_flipped_bit_of_tokenizer_json_is_seen(tmp_path):
    CharTokenizer("abc").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:]])
def test_damaged_sentencepiece_model(tmp_path, damage):
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged \(truncated, changed or of another tokenizer\)"):
        load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        load_tokenizer(tmp_path)


def test_a_model_that_changes_text_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=57, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"cannot be used here.*no pad token; it turns"):
        SentencePieceTokenizer((tmp_path / "m.model").read_bytes())
    for garbage in (b"", b"garbage" * 50):
        with pytest.raises(ValueError, match=f"these {len(garbage)} bytes are not a sentencepiece model"):
            SentencePieceTokenizer(garbage)
