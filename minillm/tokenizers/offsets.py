"""Where in a text its tokens stand: what a span of tokens is in characters."""

import unicodedata

from minillm.tokenizers.base import Tokenizer

Span = tuple[int, int]  # the first character, and the one behind the last


def offsets(tokenizer: Tokenizer, text: str) -> list[Span]:
    """The characters of `text` that each id of `tokenizer.encode(text)` stands for.

    Exact wherever the ids spell the text. A token that is part of a character has the whole character. A tokenizer that
    changes text first (uncased BERT, T5) is followed by what its pieces spell, whatever their case, accents and spaces;
    an unknown token has what lies between its neighbours.
    """
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    if tokenizer.leading_space and pieces:
        pieces[0] = pieces[0].removeprefix(b" ")
    return _exact(pieces, text) if b"".join(pieces) == text.encode() else _followed(pieces, text)


def _exact(pieces: list[bytes], text: str) -> list[Span]:
    character = [i for i, c in enumerate(text) for _ in c.encode()]  # of each byte
    spans, at = [], 0
    for piece in pieces:
        begin = character[at] if at < len(character) else len(text)
        at += len(piece)
        spans.append((begin, character[at - 1] + 1 if piece else begin))
    return spans


def _followed(pieces: list[bytes], text: str) -> list[Span]:
    """Each piece where its letters come next in the text; one whose letters come nowhere has the gap."""
    folded = [(letter, i) for i, c in enumerate(text) for letter in _fold(c)]
    letters, owner = "".join(letter for letter, _ in folded), [i for _, i in folded]
    found: list[Span | None] = []
    at = 0
    for piece in pieces:
        wanted = _fold(piece.decode("utf-8", errors="replace"))
        place = letters.find(wanted, at) if wanted else -1
        found.append((owner[place], owner[place + len(wanted) - 1] + 1) if place >= 0 else None)
        at = place + len(wanted) if place >= 0 else at
    return [span or _gap(found, i, len(text)) for i, span in enumerate(found)]


def _gap(found: list[Span | None], i: int, end: int) -> Span:
    before = next((span[1] for span in reversed(found[:i]) if span), 0)
    after = next((span[0] for span in found[i:] if span), end)
    return before, max(before, after)


def _fold(text: str) -> str:
    """Its letters, without case, accents and spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c) and not c.isspace())
