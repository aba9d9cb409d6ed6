"""BitFit: the biases train, and nothing else.

Source: Ben Zaken et al. 2021 (arXiv:2106.10199). Biases want a learning rate far above that of full tuning: the paper's
code has 1e-3 where full tuning has 1e-5.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.linears import device_of, features, is_linear, is_quantized
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import (
    base_modules,
    base_parameters,
    collapse,
    find,
    inside,
    names_of,
    ties_across,
)
from minillm.peft.record import choose
from minillm.peft.targets import parameters_in

ALL, HALF = "all", "half"
QUERIES = ("q_proj", "query", "q_lin")  # in ours and the Hub's models
MIDDLES = ("up_proj", "gate_proj", "intermediate.dense", "fc1", "lin1")  # from D to F features
NO_BIASES = "it has no biases; create_missing=True gives its linear layers zero biases (an RMSNorm cannot have one)"


@dataclasses.dataclass(frozen=True)
class BitFitPlan(Plan):
    """`carrier` names the linear layer to which peft is told to give a LoRA, of zeros; None where there is none."""

    carrier: str | None = None
    zeros: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # the LoRA's tensors: name -> shape


@dataclasses.dataclass(frozen=True)
class BitFitConfig(AdapterConfig):
    """Which biases train. There is nothing to fold: merged, the trained ones stand where the base's own stood.

    `biases`: "all", those of norms and embeddings' norms included (a norm's weight is no bias); "half", the paper's
    small variant: those of queries and of the MLP's inner layers; or names. A name is the end of a path, whole
    segments, of a bias or of its module ("q_proj", "mlp_norm.bias"); a bias's full path means that one alone. The
    paper's code looks for a text anywhere in the name, so that its "output.dense.bias" is attention.output.dense.bias
    too, and its numbers are those of both.
    `create_missing` lets each linear layer without a bias have one, zero at the start: Llama and T5 have none. An
    RMSNorm cannot have one. `trainable` modules train in full; the paper adds the classifier.

    A bias on the keys adds the same to all scores of a query, so softmax forgets it and its gradient is zero, up to
    rounding. With rotary positions it turns with its key, and trains.
    Biases train in the dtype that they have: on a bfloat16 base small steps may be lost in rounding.
    """

    name = "bitfit"
    peft_type = "MINILLM_BITFIT"  # of folders that peft cannot read; see `to_peft`
    title = "Biases (BitFit)"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    formula = "Dout for each linear layer with a bias, D for each norm; 11 D in a layer of BERT"
    hub_type = "LORA"  # as a LoRA of zeros, with the biases beside it

    biases: tuple[str, ...] = (ALL,)
    create_missing: bool = False

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.biases in (ALL, HALF):
            object.__setattr__(self, "biases", (self.biases,))
        names = names_of("biases", self.biases, problems)
        object.__setattr__(self, "biases", names)
        if names == () or (names is not None and len(names) > 1 and {ALL, HALF} & set(names)):
            problems.append(f'biases: "{ALL}" alone, "{HALF}" alone, or at least one name, not {names!r}')
        if type(self.create_missing) is not bool:
            problems.append(f"create_missing: True or False, not {self.create_missing!r}")
        return problems

    def plan(self, model: nn.Module) -> BitFitPlan:
        modules = {name: layer for name, _, layer in base_modules(model)}
        there, missing = dict(base_parameters(model)), _missing(modules)
        possible = [name for name in there if is_bias(name)] + (list(missing) if self.create_missing else [])
        problems: list[str] = []
        roots = find(modules, self.trainable, problems, "module (in trainable)")
        if all(inside(name, roots) for name in possible):  # those of a new head, say, would train anyway
            problems.append(NO_BIASES)
        chosen = self._chosen(possible, problems) if possible else []
        problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
        same = _same({**there, **missing})
        for name in chosen:
            if others := [other for other in same[name] if other not in chosen and not inside(other, roots)]:
                problems.append(f"{name} is also {', '.join(others)}, which would change too; name both")
        refuse(
            problems,
            f"BitFit does not fit this {type(model).__name__}, which is unchanged:",
            "its biases are:\n    " + "\n    ".join(collapse(possible) or ["none"]),
        )
        chosen = [name for name in chosen if not inside(name, roots)]
        first = dict.fromkeys(next(other for other in same[name] if other in chosen) for name in chosen)
        parameters = {name: there[name] if name in there else _new_bias(missing[name]) for name in first}
        parameters |= parameters_in(model, roots)
        return BitFitPlan(
            tuple(dict.fromkeys(name.rpartition(".")[0] for name in chosen)),
            tuple(roots),
            {name: torch.empty_like(parameter, device="meta") for name, parameter in parameters.items()},
            **({} if missing.keys() & first.keys() else _carrier(modules, roots)),
        )

    def _chosen(self, possible: list[str], problems: list[str]) -> list[str]:
        if self.biases == (ALL,):
            return possible
        if self.biases != (HALF,):
            return _named(possible, self.biases, problems)
        parts = [_named(possible, ends, []) for ends in (QUERIES, MIDDLES)]
        for part, ends in zip(parts, (QUERIES, MIDDLES), strict=True):
            if not part:
                problems.append(
                    f'"{HALF}": it has none of {", ".join(ends)} with a bias; name the biases that you mean'
                )
        return [name for name in possible if name in {*parts[0], *parts[1]}]

    def install(self, model: nn.Module, plan: Plan) -> None:
        """Create what is missing; `tune` copies what is there."""
        for name, layer in _missing({name: layer for name, _, layer in base_modules(model)}).items():
            if name in plan.parameters and layer.bias is None:
                layer.bias = nn.Parameter(_new_bias(layer))

    def to_peft(self, plan: BitFitPlan) -> dict[str, Any]:
        """peft has no BitFit, but it loads biases beside a LoRA: here beside one of zeros, on one layer.

        Biases that its base has not it could not load, and leaves out silently; then it is not to know the type.
        """
        if plan.carrier is None:
            return {}
        return {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "target_modules": re.escape(plan.carrier),  # a text is a regular expression: this layer and no other
            "modules_to_save": list(plan.whole) or None,
            "bias": "all",
        }

    def to_peft_tensors(self, plan: BitFitPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {_in_peft(name, plan.carrier): tensor for name, tensor in tensors.items()}
        return super().to_peft_tensors(plan, named | {name: torch.zeros(shape) for name, shape in plan.zeros.items()})

    def from_peft_tensors(self, plan: BitFitPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = super().from_peft_tensors(plan, tensors)
        ours = {_in_peft(name, plan.carrier): name for name in plan.parameters}
        lost = {name for name, tensor in named.items() if name in plan.zeros and not tensor.count_nonzero()}
        return {ours.get(name, name): tensor for name, tensor in named.items() if name not in lost}


def deltas(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Trained minus pretrained, of each parameter of the base that the adapter `name` trains in place."""
    slots = choose(model, name, "compare with its base").slots
    return {s.name: s.own.detach() - (0 if s.before is None else s.before.detach()) for s in slots}


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by the last segment of its name: bias, in_proj_bias, bias_hh_l0.

    A table of relative positions, T5's "relative_attention_bias.weight", is none.
    """
    return "bias" in name.rpartition(".")[2].split("_")


def _missing(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear layers without a bias, by the name that it would have."""
    return {
        f"{name}.bias": layer for name, layer in modules.items() if name and is_linear(layer) and layer.bias is None
    }


def _new_bias(layer: nn.Module) -> Tensor:
    return torch.zeros(features(layer)[1], dtype=layer.weight.dtype, device=device_of(layer))


def _named(biases: list[str], targets: Iterable[str], problems: list[str]) -> list[str]:
    """The biases that some target means, by their own names or their modules'."""
    module_of = {name: name.rpartition(".")[0] for name in biases}
    ends = [target for target in targets if target not in module_of]  # the others are full paths
    found = find([*module_of.values(), *biases], ends, problems, "bias", suggest=module_of.values())
    found = {*found, *targets}
    return [name for name in biases if name in found or (module_of[name] in found and module_of[name])]


def _same(objects: Mapping[str, object]) -> dict[str, list[str]]:
    """Each name -> all names of the same object."""
    names: dict[int, list[str]] = {}
    for name, value in objects.items():
        names.setdefault(id(value), []).append(name)
    return {name: names[id(value)] for name, value in objects.items()}


def _carrier(modules: Mapping[str, nn.Module], roots: Sequence[str]) -> dict[str, Any]:
    """What a plan says of the smallest layer that peft could give a LoRA; nothing if there is none."""
    linears = [name for name, layer in modules.items() if name and is_linear(layer) and not is_quantized(layer)]
    fit = [name for name in linears if not inside(f"{name}.weight", roots)]
    if not fit:
        return {}
    name = min(fit, key=lambda name: sum(features(modules[name])))
    d_in, d_out = features(modules[name])
    zeros = {f"{name}.lora_A.weight": (1, d_in), f"{name}.lora_B.weight": (d_out, 1)}
    return {"carrier": name, "zeros": zeros}


def _in_peft(name: str, carrier: str | None) -> str:
    """peft calls the layer below a LoRA base_layer."""
    return f"{carrier}.base_layer.bias" if name == f"{carrier}.bias" else name
