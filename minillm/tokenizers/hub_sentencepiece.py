"""Checkpoints whose tokenizer is a sentencepiece model: T5, CamemBERT, XLM-R, mBART, Llama 2, ALBERT."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece

from minillm.files import atomic_write
from minillm.tokenizers.base import utf8
from minillm.tokenizers.families import CONTROL, FAMILIES
from minillm.tokenizers.hub import HubTokenizer, Specials, check_gaps
from minillm.tokenizers.hub_folder import HubFolder
from minillm.tokenizers.placement import Placement
from minillm.tokenizers.subword import MODEL_FILE, SPACE

FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# A sentencepiece model is a protobuf message, and appending to one sets fields anew: here normalizer_spec (field 3)
# with add_dummy_prefix (field 3) false, so that no space is put before the first word.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class HubSentencePieceTokenizer(HubTokenizer):
    """A sentencepiece model with the ids that its checkpoint gives to the pieces.

    All tokens beyond the model's own pieces are special: none of them is ever found in text.
    """

    kind: ClassVar[str] = "hub_sentencepiece"

    def __init__(self, model: bytes, placement: Placement, specials: Specials):
        self.model, self.placement = model, placement
        self._processor = _processor(model)
        self._own = {placement.id_of(i): i for i in range(self._processor.vocab_size())}
        names = {i: name for name, i in specials.ids.items()}
        check_gaps({*self._own, *names})
        self.vocab_size = max(*self._own, *names) + 1
        self._pieces = [names.get(i) or self._own_piece(i) for i in range(self.vocab_size)]
        self.leading_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        super().__init__(specials)

    def encode(self, text: str) -> list[int]:
        return self._encode(self._processor, text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(self._continuing if self.placement.first_only else self._processor, text)

    def _encode(self, processor: Any, text: str) -> list[int]:
        utf8(text)
        pieces = processor.encode(self.placement.prepared(text))
        return self._as_text([self.placement.id_of(i) for i in pieces])

    def spell(self, name: str) -> list[int]:
        ids = (self.placement.id_of(i) for c in name for i in self._spell_character(c))
        return [i for i in ids if i != self.special_ids[name]]

    def _spell_character(self, character: str) -> list[int]:
        known = self._processor.piece_to_id(character)
        if known != self._processor.unk_id():
            return [known]
        spelled = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        return [known] if self._processor.unk_id() in spelled else spelled

    def token_bytes(self, token: int) -> bytes:
        if token == self.unk_id:
            return "\N{REPLACEMENT CHARACTER}".encode()
        own = self._own.get(token)
        if own is None or token in self._special:
            return b""
        piece = self._pieces[token]
        if self._processor.is_byte(own):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def id_to_piece(self, token: int) -> str:
        return self._pieces[token]

    def spec(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.model).hexdigest()
        return {"model_sha256": digest, "placement": self.placement.to_json(), **self._specials.to_json()}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` (sentencepiece's own format) and `tokenizer.json` into `folder`."""
        atomic_write(Path(folder) / MODEL_FILE, self.model)
        super().save(folder)

    def _own_piece(self, token: int) -> str:
        own = self._own.get(token)
        return f"<no token {token}>" if own is None else self._processor.id_to_piece(own)

    @functools.cached_property
    def _continuing(self) -> Any:
        return _processor(self.model + NO_DUMMY_PREFIX)


def read_sentencepiece(folder: HubFolder, path: Path) -> HubSentencePieceTokenizer:
    """The tokenizer of a sentencepiece file, with the ids that the folder's family gives to the pieces."""
    family = folder.family
    if family is None or family.layout is None:
        known = sorted(name for name, family in FAMILIES.items() if family.layout is not None)
        found = {k: folder.tokenizer_config.get(k) or folder.config.get(k) for k in ("tokenizer_class", "model_type")}
        raise ValueError(
            f"{path}: which ids its pieces have depends on the model, and {found} is not one known here: "
            f"{', '.join(known)}. Set tokenizer_class in tokenizer_config.json to one of them (T5Tokenizer), or add a "
            "tokenizer.json made with transformers"
        )
    model = path.read_bytes()
    try:
        return _read(folder, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(folder: HubFolder, model: bytes) -> HubSentencePieceTokenizer:
    layout, config, processor = folder.family.layout, folder.tokenizer_config, _processor(model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    if layout.moved and tuple(pieces[:3]) != CONTROL:
        raise ValueError(f"its first pieces are {pieces[:3]}; this family's models begin with {list(CONTROL)}")
    wanted = {"lower": config.get("do_lower_case", True), "strip_accents": not config.get("keep_accents", False)}
    steps = tuple(step for step in layout.prepare if wanted[step])
    placement = Placement(layout.offset, layout.moved, steps, first_only=config.get("legacy", True) is False)

    ids = _ids(folder, pieces, placement)
    roles = folder.roles(ids)
    control = {piece for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)}
    names = control | (set(ids) - set(pieces)) | {*folder.added_tokens(), *roles.values(), *folder.extra_specials()}
    if missing := sorted(names - set(ids)):
        raise ValueError(f"the folder names special tokens that have no id: {missing[:10]}")
    special_ids = {name: ids[name] for name in sorted(names, key=ids.__getitem__)}
    form = folder.with_bos_eos(folder.family_format(roles, ids), roles, ids)
    specials = Specials(roles, special_ids, form, folder.language(ids))
    tokenizer = HubSentencePieceTokenizer(model, placement, specials)
    tokenizer.chat_templates = folder.chat_templates()
    return tokenizer


def _ids(folder: HubFolder, pieces: list[str], placement: Placement) -> dict[str, int]:
    """name -> id of the pieces, of the family's tokens before and after them, and of the folder's added tokens."""
    layout = folder.family.layout
    ids = {piece: placement.id_of(i) for i, piece in enumerate(pieces)} | dict(layout.before)
    after = _after(layout.after, folder.tokenizer_config)
    ids |= {name: len(pieces) + layout.offset + n for n, name in enumerate(after)}
    names = {i: name for name, i in ids.items()}
    added = {name: token["id"] for name, token in folder.added_tokens().items()}
    if wrong := {name: i for name, i in added.items() if ids.get(name, i) != i or names.get(i, name) != name}:
        raise ValueError(f"the folder gives added tokens the ids {wrong}, which are not theirs in this family")
    return ids | added


def load_hub_sentencepiece(model: bytes, spec: Mapping[str, Any]) -> HubSentencePieceTokenizer:
    """The tokenizer that `HubSentencePieceTokenizer.save` wrote."""
    return HubSentencePieceTokenizer(model, Placement.from_json(spec["placement"]), Specials.from_json(spec))


def _after(names: tuple[str, ...], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names behind the last piece; T5's folders may state another number of sentinels."""
    number = config.get("extra_ids")
    if number is None or not names or not names[0].startswith("<extra_id_"):
        return names
    if type(number) is not int or not 0 <= number <= 10_000:
        raise ValueError(f"extra_ids is {number!r}, expected a number of sentinel tokens such as 100")
    return tuple(f"<extra_id_{i}>" for i in reversed(range(number)))


def _processor(model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(
            f"these {len(model)} bytes are not a sentencepiece model: {error}. Copy the file again; if it is a pointer "
            "of Git LFS, a few lines of text, fetch the real one"
        ) from None
    return processor
