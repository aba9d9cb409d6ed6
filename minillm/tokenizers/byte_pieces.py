"""What bytes a piece of a `tokenizers` vocabulary stands for, from the description of its decoder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
KNOWN = ("ByteLevel", "WordPiece", "Metaspace", "Sequence", "Replace", "ByteFallback", "Fuse", "Strip")
CLEANED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")  # WordPiece's decoder drops these spaces


@dataclass(frozen=True)
class PieceRule:
    """Piece -> bytes, each piece by itself; only a space that the tokenizer put at the very start is left to `decode`.

    joined: pieces are words that a space separates, apart from those that begin with `prefix` ("##").
    cleanup: no such space before punctuation. space: the character that pieces have for a space ("\u2581").
    """

    byte_level: bool = False
    byte_fallback: bool = False
    joined: bool = False
    prefix: str | None = None
    cleanup: bool = False
    space: str | None = None
    leading_space: bool = False

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> "PieceRule":
        """From the "decoder" and "pre_tokenizer" entries of tokenizer.json; ValueError for a decoder not known here."""
        if decoder is None:
            return cls(joined=True, leading_space=True)
        rule = cls()
        for step in _steps(decoder, "decoders"):
            rule = _with_step(rule, step)
        if rule.byte_level:
            steps = _steps(pre_tokenizer or {}, "pretokenizers")
            own_space = any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in steps)
            rule = replace(rule, leading_space=own_space)
        return rule

    def bytes_of(self, piece: str) -> bytes:
        """The UTF-8 bytes of a piece that is text."""
        if self.byte_level and all(c in BYTE_OF for c in piece):
            return bytes(BYTE_OF[c] for c in piece)
        if self.byte_fallback and (found := BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(found.group(1))
        if self.prefix is not None and piece.startswith(self.prefix):
            return piece.removeprefix(self.prefix).encode()
        text = piece.replace(self.space, " ") if self.space else piece
        text = f" {text}" if self.joined else text
        for dirty in CLEANED if self.cleanup else ():
            text = text.replace(dirty, dirty[1:])
        return text.encode()

    def pieces_of(self, text: str) -> list[str]:
        """`text` as the smallest pieces there could be for it: bytes or characters."""
        return [CHARACTER_OF[b] for b in text.encode()] if self.byte_level else list(text)


def _with_step(rule: PieceRule, step: Mapping[str, Any]) -> PieceRule:
    match step:
        case {"type": "ByteLevel"}:
            return replace(rule, byte_level=True)
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            return replace(rule, joined=True, prefix=prefix, cleanup=cleanup, leading_space=True)
        case {"type": "Metaspace", "replacement": space}:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return replace(rule, space=space, leading_space=scheme != "never")
        case {"type": "Replace", "pattern": {"String": space}, "content": " "}:
            return replace(rule, space=space)
        case {"type": "ByteFallback"}:
            return replace(rule, byte_fallback=True)
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return replace(rule, leading_space=True)
        case {"type": "Fuse"}:
            return rule
    raise ValueError(f"its decoder {dict(step)} is not known here; known types: {', '.join(KNOWN)}")


def _steps(part: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A part of tokenizer.json as a flat list: a Sequence holds several under `key`."""
    return [s for inner in part[key] for s in _steps(inner, key)] if part.get("type") == "Sequence" else [part]


def _byte_characters() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable Latin-1 stands for itself, the rest comes after 255.

    Source: Radford et al. 2019 (GPT-2), whose vocabulary file could not hold spaces and control characters.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_characters()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
