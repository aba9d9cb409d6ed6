"""Putting a module in another one's place: how adapters enter a model that knows nothing of them."""

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn

from minillm.peft.names import Wrapper, original_modules, places

Module = TypeVar("Module", bound=nn.Module)


def replace_modules(
    model: nn.Module, match: Callable[[str, nn.Module], bool], make: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Put `make(name, module)` in the place of every module for which `match(name, module)`; the names replaced.

    `name` is the original path (see `names`). A module that stands in several places is replaced in all of them by one
    new module, in the training or eval mode of the old one. All new modules are made before the first is put in, so an
    error leaves the model as it was. What is inside a replaced module is not looked at, and the model itself cannot be
    replaced.

    Example: `replace_modules(model, lambda name, m: isinstance(m, nn.GELU), lambda name, m: nn.ReLU())`
    """
    made: dict[int, nn.Module] = {}
    known = {id(module) for module in model.modules()}
    names: dict[str, str] = {}  # path -> original path of what is replaced
    modules: dict[str, nn.Module] = {}
    for name, path, module in original_modules(model):
        parents = (path[:i] for i, letter in enumerate(path) if letter == ".")
        if path and not any(parent in names for parent in parents) and match(name, module):
            if id(module) not in made:
                made[id(module)] = _in_mode(make(name, module), module.training, known)
            names[path], modules[path] = name, made[id(module)]
    for path, module in modules.items():
        parent, _, segment = path.rpartition(".")
        setattr(model.get_submodule(parent), segment, module)
    return list(dict.fromkeys(names.values()))


def wrap_modules(
    model: nn.Module, names: Collection[str], make: Callable[[str, nn.Module], Wrapper]
) -> list[tuple[str, Wrapper]]:
    """Put `make(name, module)` around what stands at each of the original paths `names`; (name, wrapper) of each.

    `module` may be an earlier adapter's wrapper: the newest stands outermost. Otherwise as `replace_modules`, except
    that one of the modules may be inside another.
    """
    found: dict[str, tuple[str, nn.Module]] = {}  # path -> name, module
    inside: set[str] = set()  # paths of what already has a wrapper around it
    for name, path, module, adapter in places(model):
        if isinstance(module, Wrapper):
            inside.add(f"{path}.base")
        if name in names and path not in inside and (not adapter or isinstance(module, Wrapper)):
            found[path] = name, module
    made: dict[int, Wrapper] = {}
    known = {id(module) for module in model.modules()}
    for name, module in found.values():
        if id(module) not in made:
            made[id(module)] = _in_mode(make(name, module), module.training, known)
    for path in sorted(found, key=lambda path: -path.count(".")):  # what is inside first: paths outside stay true
        parent, _, segment = path.rpartition(".")
        setattr(model.get_submodule(parent), segment, made[id(found[path][1])])
    return [(name, made[id(module)]) for name, module in found.values()]


def _in_mode(new: Module, training: bool, known: Collection[int]) -> Module:
    """`new` in training or eval mode, but for what in it was in the model already: that keeps its own."""
    for module in new.modules():
        if id(module) not in known:
            module.training = training
    return new
