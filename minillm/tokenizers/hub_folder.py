"""What the JSON files of a Hugging Face model folder say about its tokenizer, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.files import read_json
from minillm.tokenizers.families import Family, find_family
from minillm.tokenizers.formats import InputFormat, plain_format

ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
MOST = (1 << 31) - 1  # the highest id that the libraries can hold


@dataclass(frozen=True)
class HubFolder:
    """The JSON files of a model folder that say how its tokenizer is to be used; {} for one that is not there."""

    path: Path
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "HubFolder":
        names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
        return cls(path, *(_read_object(path / name) for name in names))

    @property
    def family(self) -> Family | None:
        return find_family(self.tokenizer_config.get("tokenizer_class"), self.config.get("model_type"))

    def roles(self, known: Mapping[str, int]) -> dict[str, str]:
        """Role -> token. A role that no file mentions is played by the family's customary token, if `known` has it."""
        roles = {role: name for role, name in (self.family.roles if self.family else {}).items() if name in known}
        for source in (self.special_tokens_map, self.tokenizer_config):
            for role in ROLES:
                if f"{role}_token" in source:
                    roles[role] = self._name(f"{role}_token", source[f"{role}_token"])
        roles = {role: name for role, name in roles.items() if name is not None}
        if missing := {f"{role}_token": name for role, name in roles.items() if name not in known}:
            raise ValueError(f"{self.path}: the tokenizer's files name {missing}, which its vocabulary does not have")
        return roles

    def _name(self, key: str, value: Any) -> str | None:
        name = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(name, str | None):
            raise ValueError(f"{self.path}: {key} is {value!r}; expected a string, an object with 'content', or null")
        return name

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """name -> {"id", "special", "lstrip", "rstrip", ...} of tokens added to the vocabulary, in the order of ids."""
        found = {name: {"id": i, "special": True} for name, i in self.added.items()}
        for key, value in _object(self.tokenizer_config, "added_tokens_decoder", self.path).items():
            name = self._name(f"added_tokens_decoder[{key}]", value)
            flags = dict(value) if isinstance(value, Mapping) else {}
            found[str(name)] = {"special": True, **flags, "id": int(key) if key.lstrip("-").isdigit() else key}
        ids = {name: token["id"] for name, token in found.items()}
        if wrong := {n: i for n, i in ids.items() if not n or type(i) is not int or not 0 <= i <= MOST}:
            raise ValueError(f"{self.path}: added tokens need a name and an id of 0..{MOST}, got {wrong}")
        return dict(sorted(found.items(), key=lambda item: item[1]["id"]))

    def extra_specials(self) -> list[str]:
        """Names listed as additional special tokens (mBART's languages, T5's sentinels, chat markers)."""
        names = []
        for source in (self.special_tokens_map, self.tokenizer_config):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = source.get(key) or []
                value = list(value.values()) if isinstance(value, Mapping) else value
                if not isinstance(value, list):
                    raise ValueError(f"{self.path}: {key} is {value!r}; expected a list of names")
                names += [self._name(key, item) for item in value]
        return [name for name in dict.fromkeys(names) if name]

    def with_bos_eos(self, default: InputFormat, roles: Mapping[str, str], ids: Mapping[str, int]) -> InputFormat:
        """`default`, with add_bos_token and add_eos_token applied where the folder sets them for a plain family.

        Not for tokenizer.json, whose own format rules, in transformers too.
        """
        asked = {role: self.tokenizer_config.get(f"add_{role}_token") for role in ("bos", "eos")}
        plain = self.family is None or self.family.single in ("A", "bos A")
        if not plain or set(asked.values()) == {None}:
            return default
        used = {what for what, _ in default.single}
        by_role = {role: ids[roles[role]] for role in asked if role in roles}
        put = {r: i for r, i in by_role.items() if (i in used if asked[r] is None else asked[r])}
        return plain_format(put.get("bos"), put.get("eos"))

    def family_format(self, roles: Mapping[str, str], ids: Mapping[str, int]) -> InputFormat:
        """The input format that is customary in the folder's family."""
        language = self.language(ids)
        places = {role: ids[name] for role, name in roles.items()} | ({"lang": ids[language]} if language else {})
        needed = {word.partition(":")[0] for word in f"{self.family.single} {self.family.pair}".split()} - {"A", "B"}
        if missing := sorted(needed - set(places)):
            raise ValueError(
                f"{self.path}: the input format {self.family.pair!r} of this family needs tokens for {missing}; name "
                'them in tokenizer_config.json ("cls_token": "[CLS]"), and check that its tokenizer_class is right'
            )
        return InputFormat.parse(self.family.single, self.family.pair, places)

    def language(self, ids: Mapping[str, int]) -> str | None:
        """The source language's code, for families that have one."""
        code = self.tokenizer_config.get("src_lang") or (self.family.language if self.family else None)
        if code is not None and code not in ids:
            raise ValueError(f"{self.path}: src_lang is {code!r}, which is no special token of this tokenizer")
        return code

    def chat_templates(self) -> dict[str, str]:
        """name -> template, from chat_template.jinja and its like, or tokenizer_config.json."""
        value = self.tokenizer_config.get("chat_template") or {}
        if isinstance(value, str):
            value = {"default": value}
        elif isinstance(value, list) and all(isinstance(v, Mapping) and {"name", "template"} <= set(v) for v in value):
            value = {v["name"]: v["template"] for v in value}
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for pair in value.items() for v in pair):
            raise ValueError(
                f"{self.path / 'tokenizer_config.json'}: chat_template is neither a string nor a list of "
                '{"name": ..., "template": ...}'
            )
        files = {file.stem: file for file in sorted((self.path / "additional_chat_templates").glob("*.jinja"))}
        if (file := self.path / "chat_template.jinja").is_file():
            files["default"] = file
        return {**value, **{name: read_text(file) for name, file in files.items()}}


def read_text(path: Path) -> str:
    """The file's text; ValueError when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read; copy it again") from None


def _read_object(path: Path) -> Mapping[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, expected a JSON object {{...}}; copy the file again from where "
            "the checkpoint came from"
        )
    return values


def _object(values: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{path / 'tokenizer_config.json'}: {key} is {value!r}, expected an object")
    return value
