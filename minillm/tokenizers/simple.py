"""The two tokenizers that need no algorithm: one id for each byte, one id for each character."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from minillm.tokenizers.base import Tokenizer, special_table, utf8


class ByteTokenizer(Tokenizer):
    """Id = byte value of the UTF-8 text; the specials follow from 256 on. Every text encodes, nothing is unknown."""

    kind: ClassVar[str] = "bytes"

    def __init__(self, special_symbols: Sequence[str] = ()):
        self.special_ids = special_table(["<pad>", "<s>", "</s>"], special_symbols, first_id=256)
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = 256, 257, 258, None
        self.vocab_size = 256 + len(self.special_ids)
        self._names = list(self.special_ids)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def id_to_piece(self, token: int) -> str:
        if token >= 256:
            return self._names[token - 256]
        return chr(token) if 0x20 < token < 0x7F else f"<0x{token:02X}>"

    def spec(self) -> dict[str, Any]:
        return {"special_symbols": self._names[3:]}


class CharTokenizer(Tokenizer):
    """One id for each character of an alphabet; a character outside it becomes <unk>, the one loss it allows itself.

    Specials come first (<pad> 0, <unk> 1, <s> 2, </s> 3), then the alphabet in the order given.
    """

    kind: ClassVar[str] = "characters"
    lossless = False

    def __init__(self, alphabet: Sequence[str], special_symbols: Sequence[str] = ()):
        wrong = [c for c in alphabet if len(c) != 1]
        if wrong or not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"an alphabet is different single characters, at least one; got {list(alphabet)[:20]}")
        utf8("".join(alphabet))
        self.special_ids = special_table(["<pad>", "<unk>", "<s>", "</s>"], special_symbols, first_id=0)
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = 0, 1, 2, 3
        self.alphabet = "".join(alphabet)
        self._pieces = [*self.special_ids, *self.alphabet]
        self._ids = {c: i + len(self.special_ids) for i, c in enumerate(self.alphabet)}
        self.vocab_size = len(self._pieces)

    @classmethod
    def train(cls, texts: Iterable[str], special_symbols: Sequence[str] = ()) -> "CharTokenizer":
        """The alphabet of `texts`, in code point order."""
        if isinstance(texts, str):
            raise ValueError("texts is an iterable of documents, got one str: pass [text]")
        alphabet = sorted(set().union(*texts))
        if not alphabet:
            raise ValueError("the corpus is empty: there is no character to make an alphabet of")
        return cls(alphabet, special_symbols)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return [self._ids.get(c, self.unk_id) for c in text]

    def token_bytes(self, token: int) -> bytes:
        if token == self.unk_id:
            return "\N{REPLACEMENT CHARACTER}".encode()
        return b"" if token < len(self.special_ids) else self._pieces[token].encode()

    def id_to_piece(self, token: int) -> str:
        return self._pieces[token]

    def spec(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet, "special_symbols": list(self.special_ids)[4:]}
