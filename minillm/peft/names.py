"""Names of modules and parameters: finding them, and saying them shortly.

Names are *original paths*: those the model had before anything was wrapped, so a second method finds `mlp.up_proj`
also where a first one has put a wrapper around `mlp`, and a base weight keeps its name under an adapter.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from minillm.config import nearest


class Wrapper(nn.Module):
    """A module put around another one, `base`. Its own segment of a path, `.base`, is no part of original paths."""

    base: nn.Module


def original_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(original path, path, module) of every module; one that stands in two places comes twice."""
    originals, wrapped = {"": ""}, set()
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, segment = path.rpartition(".")
        if path:
            originals[path] = originals[parent] if path in wrapped else join(originals[parent], segment)
        if isinstance(module, Wrapper):
            wrapped.add(join(path, "base"))
        yield originals[path], path, module


def every_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(original path, parameter); a shared parameter comes once under each of its names.

    Example: the adapter of `layers.0.q_proj` is `layers.0.q_proj.lora_A`, its base stays `layers.0.q_proj.weight`.
    """
    for name, _, module in original_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            yield join(name, leaf), parameter


def original_parameters(model: nn.Module, within: Sequence[str] = ("",)) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first original path; only those inside the modules `within`, if given."""
    named, seen = {}, set()
    for name, parameter in every_parameter(model):
        if _inside(name, within) and id(parameter) not in seen:
            seen.add(id(parameter))
            named[name] = parameter
    return named


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that several modules share, each of its names -> all of them."""
    owners: dict[int, list[str]] = {}
    visited = set()
    for name, _, module in original_modules(model):
        if id(module) not in visited:  # one module in two places is shared as a whole, which is no tie
            visited.add(id(module))
            for leaf, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(join(name, leaf))
    return {name: names for names in owners.values() if len(names) > 1 for name in names}


def tie(name: str, tied: dict[str, list[str]]) -> str:
    """Why the parameter `name` cannot be changed alone."""
    others = ", ".join(other for other in tied[name] if other != name)
    return (
        f"its weight is tied with {others}, which would change too; untie them first (tie_embeddings=False in the "
        "base's ModelConfig; minillm pretrain model.tie_embeddings=false)"
    )


def ties_across(model: nn.Module, within: Sequence[str]) -> dict[str, str]:
    """The parameters inside the modules `within` that are tied with one outside -> why they cannot change alone."""
    tied = tied_parameters(model)
    inside = [name for name, _ in every_parameter(model) if _inside(name, within)]
    return {name: tie(name, tied) for name in inside if not set(tied.get(name, ())).issubset(inside)}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b with a weight of its own (a subclass of nn.Linear may do something else)."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "weight" in dict(module.named_parameters(recurse=False))


def find(
    names: Iterable[str],
    targets: Sequence[str],
    problems: list[str],
    what: str,
    suggest: Iterable[str] | None = None,
) -> list[str]:
    """The names that some target matches; each target that matches none adds a line to `problems`.

    A target is a path or its end, whole segments only: "q_proj", "mlp.up_proj", "layers.3.self_attn.q_proj".
    `suggest` are the names to guess a misspelt target from, if not all of them.
    """
    names = list(dict.fromkeys(filter(None, names)))
    found = {name: [t for t in targets if f".{name}".endswith(f".{t}")] for name in names}
    for target in targets:
        if not any(target in by for by in found.values()):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in (suggest or names))
            guess = nearest(target.rpartition(".")[2], [end for end in ends if not end.isdigit()])
            problems.append(f"{target!r} matches no {what}; did you mean {guess}?")
    return [name for name in names if found[name]]


def names_of(field: str, value: Any, problems: list[str]) -> tuple[str, ...] | None:
    """A config's names as a tuple; None, and a problem, if they are no list or tuple of names."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    given = f"the text {value!r}; write ({value!r},)" if isinstance(value, str) else repr(value)
    problems.append(f"{field}: a tuple of names, not {given}")
    return None


def collapse(names: Iterable[str]) -> list[str]:
    """Shorten names that differ only in numbers: layers.0.q_proj ... layers.5.q_proj -> layers.{0..5}.q_proj."""
    patterns: dict[str, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        numbers = tuple(int(segment) for segment in name.split(".") if segment.isdigit())
        patterns.setdefault(pattern(name), []).append(numbers)
    short = []
    for text, found in patterns.items():
        axes = [sorted(set(axis)) for axis in zip(*found, strict=True)]
        if sorted(found) == list(itertools.product(*axes)):
            short.append(_fill(text, map(_span, axes)))
        else:
            short.extend(_fill(text, map(str, numbers)) for numbers in found)
    return short


def pattern(name: str) -> str:
    """The name with `#` for each number: two layers' modules of one kind have the same pattern."""
    return ".".join("#" if segment.isdigit() else segment for segment in name.split("."))


def join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(not module or name.startswith(module + ".") for module in modules)


def _fill(text: str, numbers: Iterable[str]) -> str:
    numbers = iter(numbers)
    return re.sub("#", lambda _: next(numbers), text)


def _span(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else str(numbers[0])
    return "{" + ",".join(map(str, numbers)) + "}"
