"""Which tensors of a checkpoint make which parameters of a model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.models.families.family import Architecture, Family
from minillm.models.families.source import Source
from minillm.models.heads import Head


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and the parameters it holds: one, or several that are fused along their outputs."""

    key: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]  # of each parameter along its outputs, dimension 0
    shape: tuple[int, ...]  # of the file's tensor
    transposed: bool = False
    skipped_rows: int = 0

    def read(self, source: Source, values: Mapping[str, Tensor]) -> None:
        """Fill the parameters' values from the file's tensor."""
        start = self.skipped_rows
        for name, size in zip(self.parameters, self.sizes, strict=True):
            if self.transposed:
                source.copy(self.key, values[name].t(), columns=slice(start, start + size))
            else:
                source.copy(self.key, values[name], first=start)
            start += size

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor from the parameters' values; skipped rows are zero."""
        joined = (
            torch.cat([values[name] for name in self.parameters]) if len(self.sizes) > 1 else values[self.parameters[0]]
        )
        if self.skipped_rows:
            joined = torch.cat([joined.new_zeros(self.skipped_rows, *joined.shape[1:]), joined])
        return (joined.t() if self.transposed else joined).contiguous()


def entries(family: Family, architecture: Architecture, model: nn.Module, prefix: str) -> list[Entry]:
    """The tensors that a file with this `prefix` holds for the model; each parameter is in exactly one of them."""
    names = Names(family, architecture, prefix, headed=isinstance(model, Head))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    grouped: dict[str, list[tuple[int, str]]] = {}
    for name in shapes:
        key, place = names.key(name)
        grouped.setdefault(key, []).append((place, name))
    return [_entry(family, key, [name for _, name in sorted(group)], shapes) for key, group in grouped.items()]


def tied_keys(family: Family, architecture: Architecture, model: nn.Module, prefix: str) -> dict[str, str]:
    """Keys under which a file may hold a tied parameter once more -> the key it is read from."""
    names = Names(family, architecture, prefix, headed=isinstance(model, Head))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    repeats = {again.format(prefix=prefix): of.format(prefix=prefix) for again, of in family.repeats.items()}
    repeats |= architecture.untied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name and names.known(name):
            repeats[names.key(name)[0]] = names.key(first[id(parameter)])[0]
    return repeats


class Names:
    """From the name of one of our parameters to the key of a file."""

    def __init__(self, family: Family, architecture: Architecture, prefix: str, *, headed: bool):
        self.headed = headed
        body = {}  # our module -> (theirs, its place in the fused matrix)
        for ours, theirs in family.modules.items():
            for place, module in enumerate([ours] if isinstance(ours, str) else ours):
                body[module] = (prefix + theirs, place)
        self.body = body
        self.head = {ours: (theirs.format(prefix=prefix), 0) for ours, theirs in architecture.modules.items()}

    def known(self, name: str) -> bool:
        """Whether files have a key for it."""
        return self._find(name) is not None

    def key(self, name: str) -> tuple[str, int]:
        """The key, and the parameter's place among those fused there."""
        found = self._find(name)
        assert found is not None, f"no key for {name}: the family's table lacks it"
        return found

    def _find(self, name: str) -> tuple[str, int] | None:
        if self.headed and name.startswith("body."):
            return _look_up(self.body, name.removeprefix("body."))
        return _look_up(self.head, name) or (None if self.headed else _look_up(self.body, name))


def _look_up(table: Mapping[str, tuple[str, int]], name: str) -> tuple[str, int] | None:
    numbers = re.findall(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    module, _, leaf = pattern.rpartition(".")
    theirs, place = table.get(pattern) or (None, 0)
    if theirs is None and module in table:
        theirs, place = table[module]
        theirs = f"{theirs}.{leaf}"
    if theirs is None:
        return None
    return (theirs.replace("*", numbers[0]) if numbers else theirs), place


def _entry(family: Family, key: str, parameters: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    sizes = tuple(shapes[name][0] for name in parameters)
    shape = (sum(sizes), *shapes[parameters[0]][1:])
    module = key.rpartition(".")[0]
    transposed = module.rpartition(".")[2] in family.transposed and len(shape) == 2
    skipped = next((rows for table, rows in family.skipped_rows.items() if module.endswith(table)), 0)
    shape = (shape[0] + skipped, *shape[1:])
    return Entry(key, tuple(parameters), sizes, shape[::-1] if transposed else shape, transposed, skipped)


def matches(patterns: Iterable[str], key: str) -> bool:
    """Whether one of the regular expressions is the whole key."""
    return any(re.fullmatch(pattern, key) for pattern in patterns)
