"""Frozen dataclasses as configs: to and from JSON, and `section.key=value` overrides.

Reading is strict: every unknown key, missing key and wrong type is listed in one error, with the nearest names.
"""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")
MOST_NAMED = 8  # names that stand in for a list when none is near


def nearest(name: str, options: Iterable[str]) -> str:
    """The names in `options` that look most like `name`, to stand after "did you mean"; a few of them if none does."""
    options = [str(option) for option in options]
    close = [option for option in options if option.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(name, options, n=3)
    more = f" and {len(options) - MOST_NAMED} more" if len(options) > MOST_NAMED else ""
    return " or ".join(close) if close else "one of " + ", ".join(options[:MOST_NAMED]) + more


def seed_flaw(seed: Any, name: str = "seed") -> list[str]:
    """[what is wrong with a seed], empty if every generator in use takes it (torch's overflow at 2^64)."""
    fits = type(seed) is int and 0 <= seed < 1 << 63
    return [] if fits else [f"{name}={seed!r}: a whole number from 0 to 2^63 - 1 is needed"]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that JSON can hold: nested configs become dicts, tuples become lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"a config holds numbers, text, true/false, none, tuples and configs, not {value!r}")

    return plain(config)


def given(config: Any) -> dict[str, Any]:
    """As `to_dict`, but None for what a config filled in by itself, so that it follows when the others change."""
    data = to_dict(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            data[field.name] = given(value)
        elif value is not None and field.default is None and _follows(config, field.name):
            data[field.name] = None
    return data


def _follows(config: Any, name: str) -> bool:
    """Whether the config, were this value not given, would come to the same one."""
    try:
        return dataclasses.replace(config, **{name: None}) == config
    except ValueError:  # it cannot do without
        return False


def from_dict(cls: type[Config], data: Any, where: str = "") -> Config:
    """Build `cls` from what `to_dict` gave; `where` is put before each line of an error, e.g. "config.json: ".

    Raises ValueError listing every unknown key, missing key, wrong type and value that a config refuses.
    """
    problems: list[str] = []
    config = _value(cls, data, "", problems)
    if problems:
        raise ValueError("\n".join(where + problem for problem in problems))
    return config


def override(config: Config, assignments: Sequence[str]) -> Config:
    """A copy of `config` with `section.key=value` texts applied, each value read as its field's type says.

    Example: `override(PretrainConfig(), ["train.lr=1e-3", "model.tie_embeddings=true", "run=runs/mine"])`.
    "none" is None; a tuple is written a,b (spaces around are dropped), or as JSON where an item holds a comma or its
    spaces count: '[" a", "b,c"]'; pairs are written q_proj:4,v_proj:8. What the config filled in by itself (`given`)
    follows the new values.
    Raises ValueError listing every assignment that cannot be applied.
    """
    data, known, problems = given(config), _paths(type(config)), []
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            problems.append(f"{assignment}: expected section.key=value, with a key such as {next(iter(known))}")
        elif key not in known:
            problems.append(_unknown(key, type(config), known))
        elif _section(known[key]) and text.lower() != "none":
            problems.append(f"{key}: is a section; set one of {', '.join(p for p in known if p.startswith(key + '.'))}")
        else:
            *sections, name = key.split(".")
            target = data
            for section in sections:
                target[section] = target[section] or {}  # an optional section that was None starts from its defaults
                target = target[section]
            target[name] = _read(known[key], text)
    if problems:
        if any(f" and {len(known) - MOST_NAMED} more?" in problem for problem in problems):
            problems.append("(minillm COMMAND --help lists all keys)")
        raise ValueError("\n".join(problems))
    return from_dict(type(config), data)


def _section(hint: Any) -> Any:
    """The dataclass a field's type holds (also as `Section | None`), or None for a plain field."""
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _paths(cls: type, before: str = "") -> dict[str, Any]:
    """Every key an override may name, with its type: {"run": str, "train": TrainConfig, "train.lr": float, ...}."""
    paths = {}
    for name, hint in _hints(cls).items():
        paths[before + name] = hint
        if section := _section(hint):
            paths |= _paths(section, f"{before}{name}.")
    return paths


def _unknown(key: str, cls: type, known: dict[str, Any]) -> str:
    """The line for a key that does not exist, answered from the deepest section of it that does."""
    before, _, name = key.rpartition(".")
    section = _section(known[before]) if before in known else None
    if section:
        return f"{key}: {section.__name__} has no {name!r}; did you mean {nearest(name, _paths(section))}?"
    return f"{key}: {cls.__name__} has no {key!r}; did you mean {nearest(key if before else name, known)}?"


def _read(hint: Any, text: str) -> Any:
    """Command-line text as the value its field asks for; text that does not fit stays text, for _value to refuse."""
    if type(None) in _options(hint) and text.lower() in ("none", "null"):
        return None  # before a tuple of one word
    for option in _options(hint):
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                number = float(text)
                return int(text) if option is int and "e" not in text.lower() else number
            except ValueError:
                continue
        if typing.get_origin(option) is tuple:
            return _read_tuple(typing.get_args(option)[0], text)
        if typing.get_origin(option) is Literal:
            return next((choice for choice in typing.get_args(option) if str(choice) == text), text)
    return text


def _read_tuple(item: Any, text: str) -> list[Any]:
    """A list from JSON or from text with commas; its items may be pairs with a colon."""
    if text.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # then it is a text that begins with a bracket
            return json.loads(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if typing.get_origin(item) is not tuple:
        return [_read(item, part) for part in parts]
    kinds = typing.get_args(item)
    split = [part.rsplit(":", len(kinds) - 1) for part in parts]
    return [[_read(kind, piece.strip()) for kind, piece in zip(kinds, pieces, strict=False)] for pieces in split]


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as `hint` asks (a whole float may become an int, an int a float, a list a tuple), or a new problem."""
    for option in _options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _build(option, value, where, problems)
        if origin is tuple and isinstance(value, list | tuple):
            items = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
            if len(items) == len(value):
                pairs = enumerate(zip(items, value, strict=True))
                return tuple(_value(item, part, f"{where}[{i}]", problems) for i, (item, part) in pairs)
        if origin is Literal and value in arguments and type(value) in map(type, arguments):
            return value
        if option is Any or type(value) is option or (option is type(None) and value is None):
            return value
        if option is float and type(value) is int:
            return float(value)
        if option is int and type(value) is float and value.is_integer():
            return int(value)
    problems.append(f"{where or 'config'}: expected {_describe(hint)}, got {value!r}")


def _describe(hint: Any) -> str:
    words = {type(None): "none", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if len(set(items)) > 1 and items[1] is not ...:
            return ":".join(map(_describe, items))
        return ("a list" if items[1:] == (...,) else f"{len(items)} values") + ", each " + _describe(items[0])
    if len(_options(hint)) > 1:
        return " or ".join(_describe(option) for option in _options(hint))
    return words.get(hint) or f"the keys of {hint.__name__}"


def _hints(cls: type) -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _build(cls: type, data: dict[str, Any], where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`; what is wrong goes to `problems`, each line with its dotted path."""
    hints, before = _hints(cls), f"{where}." if where else ""
    count = len(problems)
    for name in (name for name in data if name not in hints):
        problems.append(f"{before}{name}: {cls.__name__} has no {name!r}; did you mean {nearest(name, hints)}?")
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            problems.append(f"{before}{field.name}: is missing; {cls.__name__} needs it")
    values = {name: _value(hints[name], data[name], before + name, problems) for name in hints if name in data}
    if len(problems) > count:
        return None
    try:
        return cls(**values)
    except ValueError as error:  # the config's own __post_init__ refuses a value or a combination
        problems.append(f"{where}: {error}" if where else str(error))
