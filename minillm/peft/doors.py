"""Standing before a whole model: gates in the `hidden` of our models, where a text enters.

A prompt changes what goes into the model and what comes out, which no wrapper around one of its modules could do. A
model is a tree whose root nobody can replace from inside; but its method `hidden`, which `forward`, the heads, the
losses and generation all call, can be led through gates. A gate is a module: its parameters move, train and are saved
with the model.
"""

import inspect
import types
from typing import Any

from torch import Tensor, nn

from minillm.peft.names import Gate, original_modules


class Door:
    """`hidden` of `model` with the innermost `depth` of its gates before it; with all of them unless given.

    A gate is called as `gate.hidden(call, *args, **options)`: its `call` is the Door below it, whose `model` it may
    ask. It is an object and no closure, so that copying or pickling the model takes its gates along.
    """

    def __init__(self, model: nn.Module, depth: int | None = None):
        self.model, self.depth = model, depth

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        inside = gates(self.model)[: self.depth]
        if not inside:
            return type(self.model).hidden(self.model, *args, **options)
        return inside[-1].hidden(Door(self.model, len(inside) - 1), *args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """What `hidden` takes: others ask for it, to see what a model can do."""
        return inspect.signature(types.MethodType(type(self.model).hidden, self.model))


def entrances(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(original path, module) of what a text enters by: our encoder, decoder or encoder-decoder, below its head if any.

    It has `hidden(tokens, *, embeds, mask, positions, ...)` and `embed_tokens`. Models of other libraries have none.
    """
    for name in ("", "body"):
        module = model._modules.get(name) if name else model
        if module is not None and hasattr(module, "hidden") and "body" not in module._modules:
            return [(name, module)]
    return []


def enter(model: nn.Module, name: str, gate: Gate) -> None:
    """Lead the `hidden` of the module at the original path `name` through `gate`, before the gates it has already.

    Raises ValueError where `hidden` is no longer the class's own, for example compiled.
    """
    module = next(module for original, _, module in original_modules(model) if original == name)
    if not isinstance(vars(module).get("hidden", Door(module)), Door):
        raise ValueError(
            f"the `hidden` of this {type(module).__name__} was replaced by something that a gate would take out again: "
            "tune the model first, and compile it afterwards"
        )
    taken = sum(key.partition("_")[0] == gate.leaf for key in module._modules)
    module.add_module(gate.leaf if not taken else f"{gate.leaf}_{taken + 1}", gate.train(module.training))
    module.hidden = Door(module)


def reopen(module: nn.Module) -> None:
    """Make `hidden` go through the gates that are there now, after they were put back or taken away by hand."""
    vars(module).pop("hidden", None)
    if gates(module):
        module.hidden = Door(module)


def leave(module: nn.Module) -> list[Gate]:
    """Take all gates of this one module away; those that there were, the innermost first."""
    taken = gates(module)
    for key in [key for key, child in module._modules.items() if isinstance(child, Gate)]:
        del module._modules[key]
    if taken:
        vars(module).pop("hidden", None)  # the class's own is there again
    return taken


def gates(module: nn.Module) -> list[Gate]:
    """The gates of this one module, the innermost first."""
    return [child for child in module._modules.values() if isinstance(child, Gate)]


def positions_taken(model: nn.Module) -> int:
    """How many of the positions that `model` has for its text its gates use up, such as a prompt's."""
    reader = model._modules.get("model") or model  # an encoder-decoder whose source is fixed
    reader = reader._modules.get("decoder") or reader
    return sum(gate.positions for gate in gates(reader))
