"""Subword pieces learned from a corpus with the sentencepiece library."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece

from minillm.files import atomic_write
from minillm.tokenizers.base import Tokenizer, special_table, utf8

MODEL_FILE = "tokenizer.model"
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]  # ids 0..3; then extra specials, 256 bytes, learned pieces
SPACE = "\u2581"  # sentencepiece writes a space like this inside pieces
SENTENCE = 2000  # characters; sentencepiece silently skips sentences over its limit of 65536 bytes set below
PROBE = " a  b\n\n\tc\r\n \x00é🙂 "


class SentencePieceTokenizer(Tokenizer):
    """Pieces of words by byte-pair encoding or a unigram model; what has no piece is spelled in byte pieces.

    Lossless: no normalisation, no space added or removed, runs of spaces are pieces of their own, so that indented
    source code stays short. Newlines take part in pieces (":\\n").
    Sources: Sennrich et al. 2016 (arXiv:1508.07909) for BPE, Kudo 2018 (arXiv:1804.10959) for unigram,
    Kudo and Richardson 2018 (arXiv:1808.06226) for the library.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes):
        """`model`: the content of a `.model` file. ValueError when it is damaged or would change text."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"these {len(model)} bytes are not a sentencepiece model: {error}") from None
        ids = range(processor.vocab_size())
        self.model, self.vocab_size, self._processor = model, len(ids), processor
        self.pad_id, self.unk_id = processor.pad_id(), processor.unk_id()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self._pieces = [processor.id_to_piece(i) for i in ids]
        self.special_ids = {self._pieces[i]: i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
        self._bytes = [self._bytes_of(i) for i in ids]
        self._check_lossless()
        after_newline = {c for piece in self._pieces for c in re.findall(r"\n(?=(.))", piece, re.DOTALL)}
        glued = f"(?![{re.escape(''.join(sorted(after_newline)))}])" if after_newline else ""
        self._line_ends = re.compile(rf"(?<=\n){glued}")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        kind: str = "bpe",
        *,
        special_symbols: Sequence[str] = (),
        character_coverage: float = 0.9995,
    ) -> "SentencePieceTokenizer":
        """Learn `vocab_size` pieces ("bpe" or "unigram") from `texts`; the same texts give the same bytes.

        special_symbols: further tokens that are never made from text, such as "<|user|>" (see `special_ids`).
        character_coverage: this share of the corpus's characters get pieces of their own, the rare rest is bytes.
        """
        if isinstance(texts, str):
            raise ValueError("texts is an iterable of documents, got one str: pass [text]")
        if kind not in ("bpe", "unigram"):
            raise ValueError(f"kind is 'bpe' or 'unigram', got {kind!r}")
        reserved = len(special_table(SPECIALS, special_symbols, first_id=0)) + 256
        if vocab_size <= reserved:
            raise ValueError(f"vocab_size {vocab_size} leaves no room: 256 bytes and the specials take {reserved}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts), model_writer=model, vocab_size=vocab_size, model_type=kind,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=character_coverage,
                pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", control_symbols=list(special_symbols),
                max_sentence_length=1 << 16, num_threads=1, minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(_explain(str(error), vocab_size, kind)) from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.

        Lines are encoded one by one where no piece could span the line's end, so memory and time stay small for a file
        of any size. The ids are those of the whole text; for a unigram model apart from ties of its float32 scores.
        """
        utf8(text)
        lines = [line for line in self._line_ends.split(text) if line]
        return [i for line in lines for i in self._encode_line(line)]

    def _encode_line(self, line: str) -> list[int]:
        if SPACE not in line:
            return self._processor.encode(line)
        # sentencepiece would give a space back for a written U+2581, so that character is spelled in bytes
        first, *rest = (self._processor.encode(part) for part in line.split(SPACE))
        spelled = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return first + [i for part in rest for i in (*spelled, *part)]

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def id_to_piece(self, token: int) -> str:
        return self._pieces[token]

    def spec(self) -> dict[str, Any]:
        return {"model_sha256": hashlib.sha256(self.model).hexdigest()}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` (sentencepiece's own format) and `tokenizer.json` into `folder`."""
        atomic_write(Path(folder) / MODEL_FILE, self.model)
        super().save(folder)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._pieces[token]
        if token == self.unk_id:
            return "\N{REPLACEMENT CHARACTER}".encode()
        if piece in self.special_ids:
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _check_lossless(self) -> None:
        wrong = [f"it has no {name} token" for name in ("pad", "unk", "bos", "eos") if getattr(self, f"{name}_id") < 0]
        back = b"".join(self._bytes[i] for i in self._processor.encode(PROBE)).decode("utf-8", errors="replace")
        if back != PROBE:
            wrong.append(f"it turns {PROBE!r} into {back!r}")
        if wrong:
            raise ValueError(
                "this sentencepiece model cannot be used here, where decode(encode(text)) == text must hold: "
                + "; ".join(wrong)
                + ". Train one with SentencePieceTokenizer.train, which sets the options that keep text exact."
            )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences of a few lines each, so that newlines at the ends of lines take part in the pieces."""
    for text in texts:
        utf8(text)
        sentence = ""
        for line in re.findall(rf"[^\n{SPACE}]{{1,{SENTENCE}}}\n*|\n+", text):
            if len(sentence) + len(line) > SENTENCE:
                yield sentence
                sentence = ""
            sentence += line
        yield sentence


def _explain(message: str, vocab_size: int, kind: str) -> str:
    """sentencepiece's message as a sentence about the caller's arguments."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        most = found.group(1)
        return (
            f"vocab_size {vocab_size} is more than this corpus supports: {kind} finds only {most} pieces in it "
            f"(specials and 256 bytes included). Set vocab_size={most} or lower, or train on more text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: specials, 256 bytes and this corpus's characters need "
            f"{found.group(1)}. Set vocab_size above that, or lower character_coverage so that rare ones become bytes."
        )
    if "sentences_.empty()" in message:
        return "the corpus is empty: there is no text to train a tokenizer on"
    return f"sentencepiece could not train: {message}"
