"""Tokenizers that came with a checkpoint: what is common to them, whichever library encodes."""

import copy
import importlib
import importlib.util
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from minillm.tokenizers.base import Tokenizer
from minillm.tokenizers.formats import InputFormat

PROBE = " a  B\n\n\tc\r\n \x00e\u0301ﬁ🙂\u2581čž "  # what tokenizers are known to change: case, spaces, accents, forms
LANGUAGE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")  # "en_XX" (mBART), "eng_Latn" (NLLB)
GAPS = 1024  # so many ids without a token are accepted, as some checkpoints have them; more means a wrong id


@dataclass(frozen=True)
class Specials:
    """The tokens that are not text: role -> name, name -> id, their places in an input, the current language code."""

    roles: Mapping[str, str]
    ids: Mapping[str, int]
    format: InputFormat
    language: str | None = None

    def to_json(self) -> dict[str, Any]:
        roles, ids = dict(self.roles), dict(self.ids)
        return {"roles": roles, "special_ids": ids, "input_format": self.format.to_lists(), "language": self.language}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Specials":
        form = InputFormat.from_lists(**values["input_format"])
        return cls(values["roles"], values["special_ids"], form, values["language"])


class HubTokenizer(Tokenizer):
    """A tokenizer read from a checkpoint's folder.

    Where the checkpoint names no token for a role that every tokenizer here has, another one stands in: bos is [CLS],
    or else eos; eos is [SEP], or else bos; pad is eos. So GPT-2 pads with its end-of-text token: go by the mask. A
    token that is unknown and end of text in one, as in GPT-2, counts as the latter: nothing is unknown there.
    """

    language: str | None

    def __init__(self, specials: Specials):
        self._specials = specials
        self.special_ids, self.roles = dict(specials.ids), dict(specials.roles)
        self.input_format, self.language = specials.format, specials.language
        used = {*self.special_ids.values(), *self.input_format.ids}
        if outside := [i for i in used if not 0 <= i < self.vocab_size]:
            raise ValueError(f"special tokens have the ids {outside}, which the vocabulary does not have")
        self.bos_id = self._id_of("bos", "cls", "eos", "sep")
        self.eos_id = self._id_of("eos", "sep", "bos", "cls")
        self.pad_id = self._id_of("pad", "eos", "sep", "bos", "cls")
        self.unk_id = self.special_ids[self.roles["unk"]] if "unk" in self.roles else None
        if self.unk_id == self.eos_id:
            self.unk_id = None
        self._special = set(self.special_ids.values())
        self._text_only = {i: self.spell(name) for name, i in self.special_ids.items() if i != self.unk_id}
        self.lossless = self.decode(self.encode(PROBE)) == PROBE

    def _id_of(self, *roles: str) -> int:
        names = [self.roles[role] for role in roles if role in self.roles]
        if not names:
            raise ValueError(
                f"this tokenizer names no token for any of {list(roles)}; name one in tokenizer_config.json, "
                f'for example "eos_token": "</s>". Its special tokens: {list(self.special_ids)[:20]}'
            )
        return self.special_ids[names[0]]

    def with_language(self, code: str) -> "HubTokenizer":
        """The same tokenizer for text in another language: `with_specials` puts this language's code (mBART).

        Ids, pieces and fingerprint stay; `save` writes the language it was loaded with.
        """
        codes = language_ids(self.special_ids)
        if self.language is None or code not in codes:
            raise ValueError(
                f"no language code {code!r}; this tokenizer has {list(codes) if self.language else 'none'}"
            )
        other = copy.copy(self)
        other.input_format, other.language = self.input_format.swap(codes.values(), codes[code]), code
        return other

    def _as_text(self, ids: list[int]) -> list[int]:
        # a vocabulary may have a special name as an ordinary piece (T5's "</s>"), which the library then finds in text
        return [j for i in ids for j in self._text_only.get(i, (i,))]


def language_ids(special_ids: Mapping[str, int]) -> dict[str, int]:
    """Those special tokens that are language codes."""
    return {name: i for name, i in special_ids.items() if LANGUAGE.fullmatch(name)}


def check_gaps(ids: Collection[int]) -> None:
    """Raise unless the ids leave no more than a few gaps: one far outside would make an absurd vocabulary."""
    if not ids:
        raise ValueError("the vocabulary is empty")
    for i in (max(ids), min(ids)):
        if not 0 <= i < len(ids) + GAPS:
            raise ValueError(f"a token has the id {i}, but there are only {len(ids)} tokens; copy the folder again")


def require(library: str, why: str) -> ModuleType:
    """Import an optional library, or say how to get it."""
    if importlib.util.find_spec(library) is None:
        raise ValueError(f'{why} needs the library {library!r}: pip install "minillm[hub]"')
    return importlib.import_module(library)
