"""The keys of a config as a person reads them: name, default value, and the comment that stands in the source."""

import contextlib
import dataclasses
import inspect
import re
import typing
from typing import Any

from minillm.config import given


def describe_keys(config: Any) -> str:
    """One line per key, `section.key=default  # comment`, sections with their class's first docstring line."""
    blocks = _blocks(config, given(config), "")
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks if lines)


def _blocks(config: Any, values: dict[str, Any], before: str) -> list[tuple[str, list[str]]]:
    comments, hints, own, inner = _comments(type(config)), typing.get_type_hints(type(config)), [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner += _blocks(value, values[field.name], f"{before}{field.name}.")
        else:
            choices = " | ".join(typing.get_args(hints[field.name])) if _is_choice(hints[field.name]) else ""
            about = "; ".join(filter(None, (choices, comments.get(field.name))))
            own.append((f"{before}{field.name}={_text(values[field.name])}", about))
    width = min(34, max((len(assignment) for assignment, _ in own), default=0))
    lines = [f"  {assignment.ljust(width)}  {comment}".rstrip() for assignment, comment in own]
    first = (inspect.getdoc(config) or "").splitlines()[0]
    return [(f"{before.rstrip('.') or 'keys'}: {first}", lines), *inner]


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line, also of inherited fields."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        with contextlib.suppress(OSError):  # a class that make_dataclass made has no source
            found |= dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", inspect.getsource(owner), re.MULTILINE))
    return found


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(":".join(map(_text, item)) if isinstance(item, list) else _text(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
