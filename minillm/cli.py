"""The `minillm` command: each sub-command is a thin face of a recipe, which is imported only when it is called."""

import argparse
import contextlib
import importlib
import io
import os
import sys
import textwrap
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from minillm import __version__
from minillm.config import nearest, override
from minillm.recipes.commands import COMMANDS, Command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for wrong input, 128 + signal (130: Ctrl-C) when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _prepare_streams()
    # Threads that wait spin shortly, then sleep: beside another busy program several times as fast, alone no slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported, which is later
    try:
        with _short_warnings():
            _dispatch(words)
            sys.stdout.flush()  # here, where a reader that has gone is expected
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if "--debug" in words:
            traceback.print_exc()
        process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        named = isinstance(error, OSError) and error.filename is not None and error.strerror
        print(f"minillm{process}: error: {f'{error.filename}: {named}' if named else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminillm: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse has spoken, or a signal ended training with its state saved
        return error.code if isinstance(error.code, int) else 1
    return 0


def _prepare_streams() -> None:
    """Whatever the terminal: a character that it does not know prints as "?", and what comes in is UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
    elif words[0] == "--version":
        print(f"minillm {__version__}")
    else:
        name, rest = _split(words)
        FACES.get(name, _recipe)(COMMANDS[name], _parser(name).parse_intermixed_args(rest))


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, one word or two, and what follows it."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    family = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if family and (not words[1:] or words[1] in ("-h", "--help")):
        print(overview(family))
        raise SystemExit(0 if words[1:] else 2)
    if family:
        raise ValueError(
            f"minillm {words[0]} has no {words[1]!r}; did you mean {nearest(' '.join(words[:2]), family)}?"
        )
    firsts = dict.fromkeys(name.split()[0] for name in COMMANDS)
    raise ValueError(
        f"minillm has no command {words[0]!r}; did you mean {nearest(words[0], firsts)}? See minillm --help"
    )


def overview(names: Sequence[str] = ()) -> str:
    """What `minillm --help` prints."""
    names = names or list(COMMANDS)
    lines = [f"  minillm {name:<16} {COMMANDS[name].summary}" for name in names]
    head = f"minillm {__version__}: a from-scratch transformer and parameter-efficient fine-tuning framework"
    foot = "minillm COMMAND --help shows its keys with their defaults and a worked example; minillm --version"
    return "\n".join([head, "", *lines, "", foot])


class _Parser(ArgumentParser):
    """An argument parser whose help ends with the keys of the command's config."""

    command: Command

    def error(self, message: str) -> NoReturn:
        if any(not argument.startswith("-") for argument in self.command.arguments):
            message += '; a text that begins with "-" stands after "--"'
        super().error(message)

    def format_help(self) -> str:
        parts = [super().format_help()]
        if self.command.config:
            from minillm.recipes.keys import describe_keys

            parts.append(describe_keys(_load(self.command.config)()) + "\n")
        return "\n".join([*parts, f"example:\n{textwrap.indent(self.command.example, '  ')}\n"])


def _parser(name: str) -> _Parser:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"minillm {name}", description=command.summary, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.command = command
    for argument, options in command.arguments.items():
        parser.add_argument(argument, **options)
    if command.config:
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="change a key of the config, listed below"
        )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error arose")
    return parser


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings are for the user of a command: what, not where in the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"minillm: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _load(path: str) -> Any:
    """The object called "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _recipe(command: Command, arguments: Namespace) -> None:
    """Call the recipe with its config: the defaults, or for --resume the run's own, and the overrides."""
    named = getattr(arguments, "preset", None)
    default, recipe = _load(command.presets)(named) if named else _load(command.config)(), _load(command.recipe)
    if "resume" not in arguments:
        recipe(override(default, arguments.overrides))
        return
    run = next((o.partition("=")[2] for o in reversed(arguments.overrides) if o.startswith("run=")), "")
    if arguments.resume and named:
        raise ValueError(f"--preset {named} has no effect on a run that goes on: leave it out")
    if arguments.resume and run:
        from minillm.recipes.common import saved_config

        default = saved_config(type(default), run, recipe.__name__)
    recipe(override(default, arguments.overrides), resume=arguments.resume)


def _show(command: Command, arguments: Namespace) -> None:
    print(_load(command.recipe)(arguments.folder, _text(arguments.text)))


def _generate(command: Command, arguments: Namespace) -> None:
    config = override(_load(command.config)(), arguments.overrides)
    pieces = _load(command.recipe)(arguments.folder, _text(arguments.prompt), config)
    for piece in pieces if arguments.stream else ["".join(pieces)]:
        print(piece, end="", flush=True)
    print()


def _classify(command: Command, arguments: Namespace) -> None:
    config = override(_load(command.config)(), arguments.overrides)
    print(_load(command.recipe)(arguments.folder, _text(arguments.text), config))


def _info(command: Command, arguments: Namespace) -> None:
    print(_load(command.recipe)(arguments.folder, override(_load(command.config)(), arguments.overrides)))


def _compare(command: Command, arguments: Namespace) -> None:
    default = _load("minillm.recipes.compare:quick") if arguments.quick else _load(command.config)
    _load(command.recipe)(override(default(), arguments.overrides))


def _methods(command: Command, arguments: Namespace) -> None:
    print(_load(command.recipe)(arguments.folder))


def _as_arguments(command: Command, arguments: Namespace) -> None:
    print(_load(command.recipe)(**{name: value for name, value in vars(arguments).items() if name != "debug"}))


def _text(argument: str) -> str:
    """The argument, or for "-" what comes from standard input, without its last line's end."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02X}. Convert it, "
            "for example: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


FACES = {
    "tokenizer show": _show,
    "generate": _generate,
    "classify": _classify,
    "info": _info,
    "compare": _compare,
    "methods": _methods,
    "tasks": _as_arguments,
    "kernels build": _as_arguments,
    "kernels info": _as_arguments,
    "kernels emulate": _as_arguments,
    "kernels clean": _as_arguments,
}
