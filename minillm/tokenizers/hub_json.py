"""Checkpoints whose tokenizer is a tokenizer.json: GPT-2, BERT, RoBERTa, Llama 3, Qwen, Phi and many more."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minillm.files import atomic_write
from minillm.tokenizers.base import utf8
from minillm.tokenizers.byte_pieces import BYTE_FALLBACK, PieceRule
from minillm.tokenizers.formats import format_of, plain_format
from minillm.tokenizers.hub import HubTokenizer, Specials, check_gaps, language_ids, require
from minillm.tokenizers.hub_folder import HubFolder

LIBRARY_FILE = "hub_tokenizer.json"  # its name beside a model of ours, where tokenizer.json is our own description
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class JsonTokenizer(HubTokenizer):
    """A tokenizer.json, encoded by the `tokenizers` library, whose ids are those of transformers.

    Added tokens that are not special (Qwen's "<tool_call>") are text: encode finds them, decode shows them.
    """

    kind: ClassVar[str] = "tokenizers"

    def __init__(self, data: bytes, specials: Specials, library: Any = None):
        """`data`: a tokenizer.json as UTF-8; `library`: what `_parse` made of it, if that is already done.

        ValueError when the library or this class cannot read it.
        """
        self.data, self._library = data, library or _parse(data)
        description = json.loads(data)
        self.added = {token["content"]: token for token in description["added_tokens"]}
        self._rule = PieceRule.of(description.get("decoder"), description.get("pre_tokenizer"))
        self.leading_space = self._rule.leading_space
        self._ids = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self._pieces = [f"<no token {i}>" for i in range(self.vocab_size)]
        for piece, i in self._ids.items():
            self._pieces[i] = piece
        super().__init__(specials)
        self.text_tokens = {name: t["id"] for name, t in self.added.items() if name not in self.special_ids}
        self.strips = {name: (bool(t.get("lstrip")), bool(t.get("rstrip"))) for name, t in self.added.items()}

    def encode(self, text: str) -> list[int]:
        return self._encode(self._library, text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(self._continuing, text)

    def _encode(self, library: Any, text: str) -> list[int]:
        utf8(text)
        try:
            return self._as_text(library.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library's plain Exception, for a vocabulary without its unknown token
            raise ValueError(f"the library 'tokenizers' cannot encode: {error}. Copy tokenizer.json again") from None

    def spell(self, name: str) -> list[int]:
        ids = [self._ids.get(piece, self.unk_id) for piece in self._rule.pieces_of(name)]
        return [i for i in ids if i is not None and i != self._ids[name]]

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces[token]
        if token == self.unk_id:
            return b" " * self._rule.joined + "\N{REPLACEMENT CHARACTER}".encode()
        if token in self._special or piece not in self._ids:
            return b""
        return piece.encode() if piece in self.added and not self._rule.joined else self._rule.bytes_of(piece)

    def id_to_piece(self, token: int) -> str:
        return self._pieces[token]

    def starts_word(self, token: int) -> bool:
        """For WordPiece: the piece lacks "##", so punctuation is a word of its own, as in BERT."""
        if self._rule.prefix is not None:
            return not self._pieces[token].startswith(self._rule.prefix)
        return super().starts_word(token)

    def spec(self) -> dict[str, Any]:
        return {"tokenizer_sha256": hashlib.sha256(self.data).hexdigest(), **self._specials.to_json()}

    def save(self, folder: str | Path) -> None:
        """Write `hub_tokenizer.json` (the library's own format) and `tokenizer.json` into `folder`."""
        atomic_write(Path(folder) / LIBRARY_FILE, self.data)
        super().save(folder)

    @functools.cached_property
    def _continuing(self) -> Any:
        """The library's tokenizer for text that is not first: it puts no space where only the first word has one."""
        description = json.loads(self.data)
        first = json.dumps(description.get("pre_tokenizer"))
        if '"prepend_scheme": "first"' not in first:
            return self._library
        never = first.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        return _parse(json.dumps({**description, "pre_tokenizer": json.loads(never)}).encode())


def read_tokenizer_json(folder: HubFolder, path: Path, description: dict[str, Any]) -> JsonTokenizer:
    """The tokenizer of `description`, the content of `path`, with what the folder's other files add to it."""
    added = _without_bytes(description, _all_added(path, description.get("added_tokens", []), folder.added_tokens()))
    # how long inputs are is not the tokenizer's say
    description = {**description, "added_tokens": added, "truncation": None, "padding": None}
    try:
        data = json.dumps(description, sort_keys=True, ensure_ascii=False).encode()
        library = _parse(data)
        specials = _specials(folder, description, library.get_vocab(with_added_tokens=True))
        tokenizer = JsonTokenizer(data, specials, library)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokenizer.chat_templates = folder.chat_templates()
    return tokenizer


def _without_bytes(description: dict[str, Any], added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The added tokens but for the vocabulary's "<0x0A>", which trained tokenizers may list: they are text."""
    model = description.get("model")
    if not (isinstance(model, dict) and model.get("byte_fallback") and isinstance(model.get("vocab"), dict)):
        return added
    return [t for t in added if not (BYTE_FALLBACK.fullmatch(t["content"]) and t["content"] in model["vocab"])]


def _specials(folder: HubFolder, description: dict[str, Any], ids: dict[str, int]) -> Specials:
    """The special tokens of tokenizer.json and the files beside it; `ids` are those that the library gives."""
    check_gaps(ids.values())
    added = {token["content"]: token for token in description["added_tokens"]}
    if wrong := {name: token["id"] for name, token in added.items() if ids.get(name) != token["id"]}:
        raise ValueError(f"added tokens {wrong} have ids that do not follow the vocabulary")
    roles = folder.roles(ids)
    names = {name for name, token in added.items() if token.get("special")}
    names |= {*roles.values(), *folder.extra_specials()}
    if missing := sorted(names - set(ids)):
        raise ValueError(f"the folder names special tokens that the vocabulary does not have: {missing[:10]}")
    special_ids = {name: ids[name] for name in sorted(names, key=ids.__getitem__)}
    form = format_of(description.get("post_processor")) or plain_format(None, None)
    if language := folder.language(special_ids):
        form = form.swap(language_ids(special_ids).values(), special_ids[language])
    return Specials(roles, special_ids, form, language)


def load_json_tokenizer(data: bytes, spec: Mapping[str, Any]) -> JsonTokenizer:
    """The tokenizer that `JsonTokenizer.save` wrote."""
    return JsonTokenizer(data, Specials.from_json(spec))


def _parse(data: bytes) -> Any:
    library = require("tokenizers", "a checkpoint's tokenizer.json")
    model = json.loads(data).get("model")
    if isinstance(model, dict) and model.get("type", "BPE") == "BPE" and model.get("continuing_subword_prefix"):
        # the library cuts the prefix off by counting bytes; where that splits a character the process aborts
        raise ValueError("byte-pair encoding with a continuing_subword_prefix is not known here")
    try:
        tokenizer = library.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception for every mistake in the file
        raise ValueError(
            f"the library 'tokenizers' cannot read it: {error}. Copy tokenizer.json again from where the checkpoint "
            'came from, or update the library: pip install -U "minillm[hub]"'
        ) from None
    tokenizer.encode_special_tokens = True  # "</s>" in text is text
    return tokenizer


def _all_added(path: Path, listed: Any, configured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """tokenizer.json's added tokens, then those that only tokenizer_config.json or added_tokens.json know."""
    good = isinstance(listed, list) and all(
        isinstance(t, dict) and type(t.get("id")) is int and isinstance(t.get("content"), str) for t in listed
    )
    if not good:
        raise ValueError(f"{path}: added_tokens is not a list of objects with 'id' and 'content'; copy the file again")
    known = {token["content"]: token["id"] for token in listed}
    wrong = {name: (known[name], t["id"]) for name, t in configured.items() if name in known and known[name] != t["id"]}
    if wrong:
        raise ValueError(f"{path}: ids of added tokens here and in the other files of the folder differ: {wrong}")
    new = [{"content": name, **token} for name, token in configured.items() if name not in known]
    flags = dict.fromkeys(FLAGS, False)
    return [*listed, *({**flags, **{k: t[k] for k in ("id", "content", "special", *FLAGS) if k in t}} for t in new)]
