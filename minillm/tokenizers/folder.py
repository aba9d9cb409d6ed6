"""Reading back what `Tokenizer.save` wrote, believing nothing that its checksum does not confirm."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from minillm.files import read_json
from minillm.tokenizers.base import FORMAT_VERSION, Tokenizer, fingerprint_of
from minillm.tokenizers.simple import ByteTokenizer, CharTokenizer
from minillm.tokenizers.subword import MODEL_FILE, SentencePieceTokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`; ValueError when a file is missing, damaged or of another format version."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    description = read_json(path)
    missing = {"format_version", "kind", "fingerprint"} - set(description if isinstance(description, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a minillm tokenizer: it lacks {sorted(missing)}")
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {description['format_version']}, this minillm reads version 1")
    if description["kind"] not in KINDS:
        raise ValueError(f"{path} is of kind {description['kind']!r}, known kinds: {sorted(KINDS)}")
    fingerprint = description.pop("fingerprint")
    if fingerprint_of(description) != fingerprint:
        raise ValueError(f"{path} is damaged or was edited: its content does not fit its fingerprint {fingerprint}")
    return KINDS[description["kind"]](folder, description)


def _load_sentencepiece(folder: Path, description: dict) -> Tokenizer:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it belongs beside tokenizer.json")
    model = path.read_bytes()
    if hashlib.sha256(model).hexdigest() != description["model_sha256"]:
        raise ValueError(
            f"{path} is damaged (truncated, changed or of another tokenizer): it holds {len(model)} bytes that do not "
            f"fit the checksum in tokenizer.json. Copy both files again from where the tokenizer was trained."
        )
    return SentencePieceTokenizer(model)


KINDS: dict[str, Callable[[Path, dict], Tokenizer]] = {
    ByteTokenizer.kind: lambda _, spec: ByteTokenizer(spec["special_symbols"]),
    CharTokenizer.kind: lambda _, spec: CharTokenizer(spec["alphabet"], spec["special_symbols"]),
    SentencePieceTokenizer.kind: _load_sentencepiece,
}
