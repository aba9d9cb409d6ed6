"""A tokenised corpus on disk: written as a stream, read through memory maps."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from minillm.config import from_dict
from minillm.data.documents import Document
from minillm.files import atomic_folder, read_json, sha256_file, write_json
from minillm.tokenizers import Tokenizer

FORMAT_VERSION = 1
TOKENS, DOCUMENTS = "tokens.bin", "documents.bin"


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says about a token file. Counted means learned: everything except prompts."""

    format_version: int
    dtype: Literal["uint16", "uint32"]  # of tokens.bin; uint32 for more than 65536 ids
    num_tokens: int
    num_documents: int
    vocab_size: int
    pad_id: int
    tokenizer_fingerprint: str
    characters: int
    bytes: int  # UTF-8 bytes of the corpus
    counted_bytes: int  # of the counted part: what bits per byte divide by
    tokens_sha256: str
    documents_sha256: str


class TokenFile:
    """The tokens of a corpus, one document after the other, each closed by the end-of-text token.

    tokens   (num_tokens,) memory map, read-only
    starts   (num_documents,) index of each document's first token
    counted  (num_documents,) index of its first counted token: after the prompt, = starts for a plain text
    """

    def __init__(self, folder: Path, meta: Meta):
        self.folder, self.meta = folder, meta
        self.tokens = np.memmap(folder / TOKENS, dtype=meta.dtype, mode="r")
        documents = np.memmap(folder / DOCUMENTS, dtype=np.int64, mode="r").reshape(-1, 2)
        self.starts, self.counted = documents.T.copy()  # in memory: each batch searches them

    def __len__(self) -> int:
        return self.meta.num_tokens

    @property
    def ends(self) -> np.ndarray:
        """(num_documents,) index after each document's end-of-text token."""
        return np.append(self.starts[1:], len(self))

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "TokenFile":
        """Open a folder made by `write_tokens`. Sizes are always checked, all bytes (SHA-256) with `verify`."""
        folder = Path(folder)
        meta = _read_meta(folder / "meta.json")
        items = {
            TOKENS: (meta.num_tokens * np.dtype(meta.dtype).itemsize, meta.tokens_sha256),
            DOCUMENTS: (meta.num_documents * 16, meta.documents_sha256),
        }
        wrong = []
        for name, (size, digest) in items.items():
            path = folder / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != size:
                wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
            elif verify and sha256_file(path) != digest:
                wrong.append(f"{name} has the right size but other content than was written")
        if wrong:
            raise ValueError(
                f"token file {folder} is damaged: {'; '.join(wrong)}. Put it back from a copy, or write it again: "
                "a new run does, or write_tokens in Python"
            )
        return cls(folder, meta)


def _read_meta(path: Path) -> Meta:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        version = values.get("format_version") if isinstance(values, dict) else None
        raise ValueError(f"{path}: token file version {version}, this minillm reads {FORMAT_VERSION}; write it again")
    return from_dict(Meta, values, where=f"{path} is damaged, write the token file again: ")


def write_tokens(documents: Iterable[Document], tokenizer: Tokenizer, folder: str | Path) -> TokenFile:
    """Tokenise `documents` into `folder` (atomically; an older token file there is replaced) and open the result.

    A prompt and its completion are encoded apart, so that the ids of the prompt are those it has when it is given
    alone to the tuned model. Only one document's ids are in memory at a time.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} holds other files and no token file; choose an empty or new folder")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with atomic_folder(folder) as temporary:
        with open(temporary / TOKENS, "wb") as tokens, open(temporary / DOCUMENTS, "wb") as index:
            counts = _write(documents, tokenizer, dtype, tokens, index)
        if counts["num_tokens"] - counts["num_documents"] < 2:
            raise ValueError(
                f"the corpus has {counts['num_tokens'] - counts['num_documents']} tokens in {counts['num_documents']} "
                "documents; a language model predicts tokens from earlier ones, so at least 2 are needed"
            )
        meta = Meta(
            format_version=FORMAT_VERSION, dtype=dtype, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id,
            tokenizer_fingerprint=tokenizer.fingerprint, **counts,
            tokens_sha256=sha256_file(temporary / TOKENS), documents_sha256=sha256_file(temporary / DOCUMENTS),
        )  # fmt: skip
        write_json(temporary / "meta.json", asdict(meta))
    return TokenFile.open(folder)


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: str, tokens: BinaryIO, index: BinaryIO
) -> dict[str, int]:
    """Stream ids and document starts to the two files; returns the counts that `Meta` records."""
    counts = dict.fromkeys(["num_tokens", "num_documents", "characters", "bytes", "counted_bytes"], 0)
    for document in documents:
        prompt, counted = ("", document.text) if document.completion is None else (document.text, document.completion)
        prompt_ids = tokenizer.encode(prompt)
        ids = [*prompt_ids, *tokenizer.encode(counted), tokenizer.eos_id]
        np.array([counts["num_tokens"], counts["num_tokens"] + len(prompt_ids)], dtype=np.int64).tofile(index)
        np.array(ids, dtype=dtype).tofile(tokens)
        counts["num_tokens"] += len(ids)
        counts["num_documents"] += 1
        counts["characters"] += len(document.full_text)
        counts["bytes"] += len(document.full_text.encode())
        counts["counted_bytes"] += len(counted.encode())
    return counts
