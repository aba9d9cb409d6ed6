"""Which layers a method adapts: its targets against a model's layers, with every problem in one error."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from minillm.peft.linears import is_linear
from minillm.peft.method import Plan, refuse
from minillm.peft.names import (
    base_modules,
    base_parameters,
    collapse,
    find,
    inside,
    tie,
    tied_parameters,
    ties_across,
)

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")  # output layers, in ours and the Hub's models


@dataclasses.dataclass(frozen=True)
class Found:
    """The layers that targets mean. `names` has a layer in two places twice, `layers` once; `whole` trains in full."""

    names: tuple[str, ...]
    layers: Mapping[str, nn.Module]  # the base's own layers, below wrappers
    roots: tuple[str, ...]
    whole: Mapping[str, nn.Parameter]

    def plan(self, parameters: Mapping[str, Tensor]) -> Plan:
        """The plan to train `parameters`, those of the adapters, and the whole modules beside them."""
        beside = {name: torch.empty_like(parameter, device="meta") for name, parameter in self.whole.items()}
        return Plan(self.names, self.roots, {**parameters, **beside})


def find_targets(
    model: nn.Module,
    targets: tuple[str, ...],
    trainable: tuple[str, ...],
    *,
    method: str,
    kind: Callable[[nn.Module], bool] = is_linear,
    kind_name: str = "linear layer",
    fits: Callable[[str, nn.Module], str | None] = lambda name, layer: None,
    among: Mapping[str, Iterable[str]] | None = None,
) -> Found:
    """The layers of `model` that `targets` name, and the modules `trainable`; one ValueError lists all that is wrong.

    A target is the end of a path, whole segments, or "all-linear": every linear layer but an output head and what is in
    `trainable`. Two that mean one module are refused: one of them is a mistake, or does nothing. `kind` says which
    modules count, `fits(name, layer)` why one of them cannot be adapted (None: it can). `among` are further names, by
    field of the config, each of which must mean one of the targets. `method` begins the error's first line.
    """
    problems: list[str] = []
    modules = {name: (outer, own) for name, outer, own in base_modules(model)}
    layers = {name: own for name, (_, own) in modules.items() if kind(own)}
    roots = find(modules, trainable, problems, "module (in trainable)")
    names = _names(modules, layers, targets, roots, problems, kind_name)
    for field, keys in (among or {}).items():
        find(names, list(keys), problems, f"target (in {field})")
    whole = parameters_in(model, roots)
    misfits = _misfits(model, names, modules, layers, whole, kind_name, fits)
    problems += together(misfits)
    problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
    there = f"its {kind_name}s are:\n    " + "\n    ".join(collapse(layers) or ["none"])
    refuse(problems, f"{method} does not fit this {type(model).__name__}, which is unchanged:", there)
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(id(layers[name]), name)
    return Found(tuple(names), {name: layers[name] for name in first.values()}, tuple(roots), whole)


def parameters_in(model: nn.Module, roots: Iterable[str]) -> dict[str, nn.Parameter]:
    """The base's parameters inside the modules `roots`; a shared one once, under its first name."""
    roots, named, seen = tuple(roots), {}, set()
    for name, parameter in base_parameters(model):
        if inside(name, roots) and id(parameter) not in seen:
            seen.add(id(parameter))
            named[name] = parameter
    return named


def together(problems: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all names that have the same problem."""
    about: dict[str, list[str]] = {}
    for name, problem in problems:
        about.setdefault(problem, []).append(name)
    return [f"{', '.join(collapse(names))}: {problem}" for problem, names in about.items()]


def without_doubles(targets: Sequence[str]) -> list[str]:
    """The same modules by fewer targets: without those that end in another one, which peft allows."""
    return [target for target in targets if not any(target.endswith(f".{other}") for other in targets)]


def _names(
    modules: Mapping, layers: Mapping, targets: tuple[str, ...], roots: list[str], problems: list[str], kind: str
) -> list[str]:
    if "" in layers:
        problems.append(
            f"it is a {kind} itself, and an adapter takes the place of one inside a model: put it into one, such as "
            'nn.Sequential(layer), with the target "0"'
        )
        return []
    find(modules, [t for t in targets if t != ALL_LINEAR], problems, "module", suggest=layers)
    meant = {name: [t for t in targets if _means(t, name, layers.get(name), roots)] for name in modules}
    problems += together(_doubly(meant, modules))
    return [name for name in modules if meant[name]]


def _means(target: str, name: str, layer: nn.Module | None, roots: Iterable[str]) -> bool:
    if target == ALL_LINEAR:
        other = name.rpartition(".")[2] in HEADS or inside(f"{name}.weight", roots)
        return layer is not None and is_linear(layer) and not other
    return f".{name}".endswith(f".{target}")


def _doubly(meant: Mapping[str, list[str]], modules: Mapping) -> Iterator[tuple[str, str]]:
    """(name, which targets mean it); a target that is the whole path of another module is meant for that one."""
    for name, targets in meant.items():
        targets = [target for target in targets if target == name or target not in modules]
        if len(targets) > 1:
            yield name, f"is meant by {' and '.join(map(repr, targets))}; leave one out"


def _misfits(model, names, modules, layers, whole, kind_name, fits) -> Iterator[tuple[str, str]]:
    """(name, why it cannot be adapted)"""
    tied = tied_parameters(model)
    for name in names:
        if (layer := layers.get(name)) is None:
            yield name, f"is a {type(modules[name][1]).__name__}, not a {kind_name}"
            continue
        if problem := fits(name, layer):
            yield name, problem
        if f"{name}.weight" in tied:
            yield name, tie(f"{name}.weight", tied)
        if f"{name}.weight" in whole:
            yield name, "is a target and in `trainable`; choose one"
        for other in layers:
            if layers[other] is layer and other not in names:
                yield name, f"is also {other}, which would change too; target both"
