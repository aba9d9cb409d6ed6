"""Patterns: a number of its own for some of a method's targets, as `rank_pattern` and `alpha_pattern` of a LoRA."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from minillm.peft.names import find

Value = TypeVar("Value")


def pairs_of(field: str, value: Any, problems: list[str]) -> tuple[tuple[str, Any], ...]:
    """A pattern as a tuple of pairs, from that or a dict; what is neither is a problem."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, list | tuple) and all(
        isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        return tuple((target, number) for target, number in pairs)
    problems.append(f'{field}: targets with a number each, such as {{"v_proj": 4}}, not {value!r}')
    return ()


def value_of(pairs: Sequence[tuple[str, Value]], name: str, default: Value) -> Value:
    """What the pattern says for the module `name`. A key is the end of a path; the whole path goes first."""
    return next((value for _, value in _matching(pairs, name)), default)


def ambiguous(pairs: Sequence[tuple[str, Value]], name: str) -> str | None:
    """Why the pattern does not say one number for the module `name`; None if it does."""
    found = _matching(pairs, name)
    if len({value for _, value in found}) < 2:
        return None
    return f"{' and '.join(f'{key!r}: {value}' for key, value in found)} both mean it; leave one out"


def to_peft(pairs: Sequence[tuple[str, Value]]) -> dict[str, Value]:
    """For peft, which takes the first key that is the end of a path: whole paths before ends of them."""
    return dict(sorted(pairs, key=lambda pair: -len(pair[0])))


def from_peft(pattern: Mapping[str, Value] | None, names: Iterable[str], targets: Iterable[str]) -> dict[str, Value]:
    """peft's pattern, with the whole path of each target for which it depends on which of two keys stands first."""
    pattern, whole = dict(pattern or {}), {}
    for name in find(names, list(targets), [], ""):
        values = [value for key, value in pattern.items() if f".{name}".endswith(f".{key}")]
        if any(value != values[0] for value in values):
            whole[name] = values[0]
    return {**{key: value for key, value in pattern.items() if key not in whole}, **whole}


def _matching(pairs: Iterable[tuple[str, Value]], name: str) -> list[tuple[str, Value]]:
    """The pairs whose key is `name`, or if there is none, those whose key is an end of it."""
    pairs = [(key, value) for key, value in pairs if f".{name}".endswith(f".{key}")]
    return [(key, value) for key, value in pairs if key == name] or pairs
