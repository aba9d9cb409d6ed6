"""Names of modules and parameters: finding them, and saying them shortly.

Names are *original paths*: those the model had before anything was wrapped, so a second method finds `mlp.up_proj`
also where a first one has put a wrapper around `mlp`, and a base weight keeps its name under an adapter.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from minillm.config import nearest

DEFAULT = "default"  # the name of an adapter that was given none


class Added(nn.Module):
    """A module that an adapter brought; `adapter` is that adapter's name."""

    adapter: str = DEFAULT


class Wrapper(Added):
    """A module put around another one, `base`. Its own segment of a path, `.base`, is no part of original paths.

    A wrapper that can become part of its base also has `folded() -> dict[str, Tensor]`: the base's tensors that change,
    each with its new value, computed in float32 at least and rounded once.
    """

    base: nn.Module


class Gate(Added):
    """A module that stands in the `hidden` of a whole model (see `doors`); `leaf` is its segment of original paths."""

    leaf = "gate"
    positions = 0  # of those that the model has for a text, how many it uses up

    def hidden(self, call: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """What the model computes instead of `call(*args, **options)`."""
        raise NotImplementedError


class Place(NamedTuple):
    """Where a module stands: its original path, its path, and the adapter that it belongs to ("": the base)."""

    name: str
    path: str
    module: nn.Module
    adapter: str


def places(model: nn.Module) -> Iterator[Place]:
    """Every module; one that stands in two places comes twice, and a wrapper before what it is around."""
    yield from _walk(Place("", "", model, ""))


def _walk(place: Place) -> Iterator[Place]:
    yield place
    module = place.module
    for segment, child in module._modules.items():
        if child is None:
            continue
        inner = isinstance(module, Wrapper) and segment == "base"
        adapter = "" if inner else place.adapter
        name = place.name if inner else join(place.name, segment)
        if isinstance(child, Added):
            adapter = child.adapter
            name = join(place.name, child.leaf) if isinstance(child, Gate) else name
        yield from _walk(Place(name, join(place.path, segment), child, adapter))


def original_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(original path, path, module) of every module; one that stands in two places comes twice."""
    return ((place.name, place.path, place.module) for place in places(model))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(original path, the module there now, the base's own below its wrappers), without what adapters brought."""
    around: dict[int, nn.Module] = {}  # id of a wrapper's base -> the outermost wrapper
    for place in places(model):
        if isinstance(place.module, Wrapper):
            around[id(place.module.base)] = around.get(id(place.module), place.module)
        elif not place.adapter:
            yield place.name, around.get(id(place.module), place.module), place.module


def innermost(module: nn.Module) -> nn.Module:
    """The base's own module below all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def every_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(original path, parameter); a shared parameter comes once under each of its names.

    Example: the adapter of `layers.0.q_proj` is `layers.0.q_proj.lora_A`, its base stays `layers.0.q_proj.weight`; the
    parameter of an adapter with a name of its own, "poems", is `layers.0.q_proj.lora_A@poems`.
    """
    for name, _, module, adapter in places(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            yield join(name, leaf) + ("" if adapter in ("", DEFAULT) else f"@{adapter}"), parameter


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `every_parameter`, of the base alone."""
    for name, _, module, adapter in places(model):
        if not adapter:
            for leaf, parameter in module.named_parameters(recurse=False):
                yield join(name, leaf), parameter


def original_parameters(model: nn.Module, within: Sequence[str] = ("",)) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first original path; only those inside the modules `within`, if given."""
    named, seen = {}, set()
    for name, parameter in every_parameter(model):
        if inside(name, within) and id(parameter) not in seen:
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


def ties_across(model: nn.Module, within: Iterable[str], more: Iterable[str] = ()) -> dict[str, str]:
    """Parameters in the modules `within`, and `more`, tied with one that is not -> why they cannot change alone."""
    tied, within, more = tied_parameters(model), tuple(within), set(more)
    chosen = [name for name, _ in base_parameters(model) if inside(name, within) or name in more]
    return {name: tie(name, tied) for name in chosen if not set(tied.get(name, ())).issubset(chosen)}


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
            ends = [end for end in ends if not end.isdigit()]
            hint = f"; did you mean {nearest(target.rpartition('.')[2], ends)}?" if ends else ""
            problems.append(f"{target!r} matches no {what}{hint}")
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


def inside(name: str, modules: Sequence[str]) -> bool:
    return any(not module or name.startswith(module + ".") for module in modules)


def _fill(text: str, numbers: Iterable[str]) -> str:
    numbers = iter(numbers)
    return re.sub("#", lambda _: next(numbers), text)


def _span(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else str(numbers[0])
    return "{" + ",".join(map(str, numbers)) + "}"
