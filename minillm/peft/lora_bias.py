"""Biases that train beside a LoRA, as Hugging Face peft means them: none, those of the adapted layers, or all.

Source: peft 0.21, tuners_utils._mark_only_adapters_as_trainable and _get_learnable_bias_state_dict.
"""

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillm.peft.method import Method, Plan
from minillm.peft.names import base_parameters, inside

BIASES = ("none", "all", "lora_only")
BELOW, ORIGINAL = ".base_layer.", ".original_module."  # segments that peft puts in names
REPEATS = (r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\.")  # the second, with an adapter's name, deep inside


class NoBias(ValueError):
    """Biases are to train, and the model has none."""


@dataclasses.dataclass(frozen=True)
class LoraPlan(Plan):
    """`biases`: names of the base's biases that train beside the adapters; `again`: their other names, where shared."""

    biases: tuple[str, ...] = ()
    again: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def touched(self) -> tuple[str, ...]:
        return super().touched + self.biases


def with_biases(plan: Plan, model: nn.Module, bias: str) -> LoraPlan:
    """The plan to train `bias` too: "all" of the model's, or "lora_only", the adapted layers'. NoBias if there is none.

    A bias is what is called exactly so: nn.MultiheadAttention's in_proj_bias is none. Those of modules that train in
    full train with them. One that several modules share is one parameter, and so changes in all of them.
    """
    names: dict[int, list[str]] = {}
    there: dict[str, nn.Parameter] = {}
    for name, parameter in base_parameters(model):
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and not inside(name, plan.whole):
            there[name] = parameter
            if bias == "all" or (bias == "lora_only" and module in plan.adapted):
                names.setdefault(id(parameter), []).append(name)
    if not names and bias != "none":
        none = "it has no biases" + " outside `trainable`" * bool(plan.whole)
        none = 'no adapted layer has a bias; "all" would train those of other layers' if there else none
        raise NoBias(f'bias="{bias}" does not fit this {type(model).__name__}, which is unchanged: {none}')
    first = {key: those[0] for key, those in names.items()}
    again = {name: first[id(p)] for name, p in there.items() if id(p) in first and name != first[id(p)]}
    new = {name: torch.empty_like(there[name], device="meta") for name in first.values()}
    return LoraPlan(plan.adapted, plan.whole, {**plan.parameters, **new}, tuple(new), again)


def if_any(config: Method, model: nn.Module) -> Method:
    """The config, or without biases where the model has none: peft says nothing of that."""
    try:
        config.plan(model)
    except NoBias:
        return dataclasses.replace(config, bias="none")
    except ValueError:
        pass  # who tunes with it is told, together with all else that is wrong
    return config


def peft_name(name: str, plan: Plan) -> str:
    """What peft calls a parameter of the base: the adapted layer is below a wrapper."""
    module, _, leaf = name.rpartition(".")
    return f"{module}{BELOW}{leaf}" if leaf == "bias" and module in plan.adapted else name


def our_names(plan: LoraPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: of a shared bias the first name alone. Names that differ in value stay, to be refused."""
    ours = {peft_name(name, plan): name for name in (*plan.biases, *plan.again)}
    ours = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    equal = {name for name, first in plan.again.items() if name in ours and _same(ours[name], ours.get(first))}
    return {name: tensor for name, tensor in ours.items() if name not in equal}


def without_repeats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of peft's file, once each.

    With bias "all" peft writes the biases of a module in `modules_to_save` three times: as any of its parameters, by
    its wrapper's name, and once more as they were before training.
    """
    kept = {}
    for name, tensor in tensors.items():
        others = [re.sub(repeat, ".", name) for repeat in REPEATS if re.search(repeat, name)]
        before = ORIGINAL in name and name.replace(ORIGINAL, ".") in tensors
        if not before and not any(_same(tensor, tensors.get(other)) for other in others):
            kept[name] = tensor
    return kept


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)
