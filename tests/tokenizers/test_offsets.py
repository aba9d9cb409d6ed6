"""Which characters a token stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from minillm.tokenizers.base import Tokenizer
from minillm.tokenizers.offsets import offsets

CORPUS = ["the cat sat on the mat  and\n\nsaw a naïve café — čšž 🙂 two  spaces "] * 20
ODD = [
    "a  b\n\tc",
    " leading and trailing ",
    "naïve café",
    "🙂🙂x",
    "e\u0301 combined",
    "no\u00a0break",
    "\u2003wide",
    "ß İ",
]
SENTENCEPIECE = SentencePieceTokenizer.train(CORPUS, 330)
TOKENIZERS = [SENTENCEPIECE, ByteTokenizer(), CharTokenizer.train([*CORPUS, *ODD])]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
def test_what_a_token_spells_stands_there(tokenizer, text):
    """Whole pieces spell exactly their characters, parts of a character have all of it, and together they cover all."""
    ids, spans = tokenizer.encode(text), offsets(tokenizer, text)
    assert len(ids) == len(spans)
    for i, (begin, end) in zip(ids, spans, strict=True):
        piece = tokenizer.token_bytes(i)
        try:
            assert text[begin:end] == piece.decode()
        except UnicodeDecodeError:
            assert end == begin + 1 and piece in text[begin:end].encode()
    assert {at for begin, end in spans for at in range(begin, end)} == set(range(len(text)))


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_any_text_is_covered_in_order(text):
    spans = offsets(SENTENCEPIECE, text)
    assert spans == sorted(spans) and {at for a, b in spans for at in range(a, b)} == set(range(len(text)))


class Lowering(Tokenizer):
    """As uncased BERT: lowers, drops accents and spaces, knows few letters, and marks no word's beginning."""

    kind, lossless, unk_id = "lowering", False, 0
    words = ("<unk>", "cafe", "is", "hot", "!")
    special_ids = {"<unk>": 0}  # noqa: RUF012
    vocab_size = 5

    def encode(self, text):
        known = {"café": 1, "is": 2, "hot": 3}
        return [known.get(word.lower(), 0) for word in text.split()]

    def token_bytes(self, token):
        return "\N{REPLACEMENT CHARACTER}".encode() if token == 0 else self.words[token].encode()

    def id_to_piece(self, token):
        return self.words[token]

    def spec(self):
        return {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Café   is\tHOT", ["Café", "is", "HOT"]),
        ("  Cafe\u0301 IS hot ", ["Cafe\u0301", "IS", "hot"]),
        ("is 犬犬 hot", ["is", " 犬犬 ", "hot"]),  # what it does not know has the gap
    ],
)
def test_a_tokenizer_that_changes_text_is_followed(text, words):
    assert Lowering().encode(text).count(0) == sum("犬" in word or "\u0301" in word for word in words)
    spans = offsets(Lowering(), text)
    found = [text[begin:end] for begin, end in spans]
    assert [word.strip() for word in found] == [word.strip() for word in words]


def test_a_space_put_before_the_text_is_not_the_texts():
    class Leading(ByteTokenizer):
        leading_space = True

        def encode(self, text):
            return super().encode(" " + text)

    assert offsets(Leading(), "ab") == [(0, 0), (0, 1), (1, 2)]


def test_no_text_has_no_tokens():
    assert offsets(SENTENCEPIECE, "") == []
