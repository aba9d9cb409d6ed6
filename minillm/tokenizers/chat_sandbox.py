"""Running a chat template, which is code from a stranger: out of reach of Python, with bounded loops and output.

A hostile template can still waste memory (`'x' | center(10 ** 10)`); it cannot read, write or call anything outside.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from minillm.tokenizers.hub import require

MARK = "\U0010fffd"  # a private-use character, put into text that must not become a special token (see chat.py)
MOST_STEPS, MOST_CHARACTERS = 1_000_000, 20_000_000  # for one rendering: steps of all range() loops, output


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text that the Jinja `template` makes of `values`; ValueError when it is wrong, refuses, or does too much."""
    _jinja()  # if it is missing, that is not the template's mistake
    try:
        parts, length = [], 0
        for part in compiled(template).generate(range=_Steps(), **values):
            length += len(part)
            if length > MOST_CHARACTERS:
                raise OverflowError(f"it wrote more than {MOST_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)
    except Exception as error:  # a template can raise whatever Python can; all of it is the template's mistake
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise ValueError(
            f"the chat template failed{line}: {type(error).__name__}: {error}. Is it meant for these messages? It "
            f"begins with {template[:80]!r}"
        ) from error


def _jinja() -> ModuleType:
    jinja2 = require("jinja2", "a chat template")
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError(f'jinja2 {jinja2.__version__} has holes in its sandbox: pip install -U "minillm[hub]"')
    return jinja2


class _Steps:
    """range() for one rendering, whose loops all together have a limited number of steps."""

    def __init__(self) -> None:
        self._left = MOST_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._left -= len(steps)
        if self._left < 0:
            raise OverflowError(f"its loops over range() take more than {MOST_STEPS} steps")
        return steps


@functools.lru_cache(maxsize=32)
def compiled(template: str) -> Any:
    """The compiled template, in a sandbox with the options and functions that transformers gives to chat templates."""
    jinja2 = _jinja()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote, for training; here it only groups."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's own, which refuses Python's underscore attributes and changing values; and no huge products."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if numbers:
                too_large = operator == "**" and (abs(left) > 1e12 or abs(right) > 64)
            else:
                too_large = _length(left) * _length(right) > MOST_CHARACTERS
            if too_large:
                raise SecurityError(f"{type(left).__name__} {operator} {type(right).__name__} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=_strftime_now)
    del environment.globals["lipsum"]  # random filler text of any length
    return environment.from_string(template)


def _length(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As json.dumps (Jinja's own filter escapes for HTML); the mark stays a mark, however it is written."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options).replace(json.dumps(MARK)[1:-1], MARK)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
