"""The one door to a saved tokenizer: ours, checked against its fingerprint, or a Hugging Face model folder's."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.files import read_json
from minillm.shipped import find_shipped, near_shipped
from minillm.tokenizers.base import FORMAT_VERSION, Tokenizer, fingerprint_of
from minillm.tokenizers.hub_folder import HubFolder
from minillm.tokenizers.hub_json import LIBRARY_FILE, JsonTokenizer, load_json_tokenizer, read_tokenizer_json
from minillm.tokenizers.hub_sentencepiece import (
    FILES,
    HubSentencePieceTokenizer,
    load_hub_sentencepiece,
    read_sentencepiece,
)
from minillm.tokenizers.legacy import BPE, WORDPIECE, describe_bpe, describe_wordpiece
from minillm.tokenizers.simple import ByteTokenizer, CharTokenizer
from minillm.tokenizers.subword import MODEL_FILE, SentencePieceTokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`: one that `Tokenizer.save` wrote, or the one of a Hugging Face model folder.

    `folder` may also be the name of a model that minillm ships.

    Of the latter, tokenizer.json is read with the `tokenizers` library; a sentencepiece file (without the library also
    where there is a tokenizer.json), and the old vocab.txt or vocab.json with merges.txt, where that is all there is.
    ValueError when a file is missing, damaged, or of a kind or version not known here. Nothing in a folder is executed.
    """
    folder = find_shipped(folder)
    path = folder / "tokenizer.json"
    model = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path.is_file():
        description = read_json(path)
        if not _is_from_hub(description):
            return _load_ours(folder, path, description)
        if model is None or importlib.util.find_spec("tokenizers") is not None:
            return read_tokenizer_json(HubFolder.read(folder), path, description)
    if model is not None:
        return read_sentencepiece(HubFolder.read(folder), model)
    for names, describe in ((WORDPIECE, describe_wordpiece), (BPE, describe_bpe)):
        if all((folder / name).is_file() for name in names):
            files = HubFolder.read(folder)
            return read_tokenizer_json(files, folder / names[0], describe(files))
    beside = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else "no such folder"
    raise ValueError(
        f"{path} does not exist, nor another file to make a tokenizer of ({', '.join((*FILES, *WORDPIECE))}, "
        f"{' with '.join(BPE)}); its folder holds: {beside}{near_shipped(folder)}"
    )


def _is_from_hub(description: Any) -> bool:
    """Whether this is the library's tokenizer.json and not ours, which has the same name."""
    return isinstance(description, dict) and "model" in description and "kind" not in description


def _load_ours(folder: Path, path: Path, description: Any) -> Tokenizer:
    missing = {"format_version", "kind", "fingerprint"} - set(description if isinstance(description, dict) else ())
    if missing:
        raise ValueError(
            f"{path} is not a minillm tokenizer: it lacks {sorted(missing)}; nor is it one of the library "
            "'tokenizers', which has 'model'. Copy the file again from where the tokenizer came from"
        )
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {description['format_version']}, this minillm reads version 1")
    if description["kind"] not in list(KINDS):
        raise ValueError(f"{path} is of kind {description['kind']!r}, known kinds: {sorted(KINDS)}")
    fingerprint = description.pop("fingerprint")
    chat, chat_fingerprint = description.pop("chat_templates", {}), description.pop("chat_fingerprint", None)
    if fingerprint_of(description) != fingerprint or (chat and fingerprint_of(chat) != chat_fingerprint):
        raise ValueError(f"{path} is damaged or was edited: its content does not fit its fingerprint {fingerprint}")
    try:
        tokenizer = KINDS[description["kind"]](folder, description)
        tokenizer.chat_templates = {str(name): str(template) for name, template in chat.items()}
    except (KeyError, TypeError, AttributeError) as error:  # a fingerprint vouches for the bytes, not for their sense
        raise ValueError(
            f"{path} does not describe a tokenizer of kind {description['kind']!r}: {type(error).__name__} {error}"
        ) from None
    return tokenizer


def _read_checked(path: Path, sha256: str) -> bytes:
    """The bytes of the file beside tokenizer.json whose checksum that one states."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it belongs beside tokenizer.json")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} is damaged (truncated, changed or of another tokenizer): it holds {len(data)} bytes that do not "
            f"fit the checksum in tokenizer.json. Copy both files again from where the tokenizer was trained."
        )
    return data


KINDS: dict[str, Callable[[Path, dict], Tokenizer]] = {
    ByteTokenizer.kind: lambda _, spec: ByteTokenizer(spec["special_symbols"]),
    CharTokenizer.kind: lambda _, spec: CharTokenizer(spec["alphabet"], spec["special_symbols"]),
    SentencePieceTokenizer.kind: lambda folder, spec: SentencePieceTokenizer(
        _read_checked(folder / MODEL_FILE, spec["model_sha256"])
    ),
    HubSentencePieceTokenizer.kind: lambda folder, spec: load_hub_sentencepiece(
        _read_checked(folder / MODEL_FILE, spec["model_sha256"]), spec
    ),
    JsonTokenizer.kind: lambda folder, spec: load_json_tokenizer(
        _read_checked(folder / LIBRARY_FILE, spec["tokenizer_sha256"]), spec
    ),
}
