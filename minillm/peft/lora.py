"""LoRA as a method: which layers of a model get an adapter, and how Hugging Face peft would say it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from minillm.peft.lora_linear import LoRALinear, adapter_dtype, rank_problem
from minillm.peft.method import Method, Plan, refuse
from minillm.peft.names import (
    collapse,
    find,
    is_linear,
    names_of,
    original_modules,
    original_parameters,
    tie,
    tied_parameters,
    ties_across,
)
from minillm.peft.replace import replace_modules

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")  # output layers, in ours and the Hub's models
PEFT_BOOKKEEPING = (  # fields of adapter_config.json that change no number by themselves
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size"),
)

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class LoraConfig(Method):
    """Which linear layers get a LoRA, and of what size.

    A target is the end of a module's path, whole segments ("q_proj", "mlp.up_proj"), or "all-linear": every linear
    layer but the output head. Trainable values: R * (Din + Dout), summed over the layers.
    `rank_pattern` and `alpha_pattern` give some targets a value of their own: (("v_proj", 4),) or {"v_proj": 4}, on the
    command line lora.rank_pattern=v_proj:4,k_proj:2.
    `trainable` names modules that train in full beside the adapters and are saved with them, such as a new head.
    """

    name = "lora"
    peft_type = "LORA"

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # q_proj:4,v_proj:8
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # q_proj:8,v_proj:16
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        problems: list[str] = []
        for name in ("targets", "trainable"):
            object.__setattr__(self, name, names_of(name, getattr(self, name), problems))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _pairs(name, getattr(self, name), problems))
        for name, value in (("rank", self.rank), *self.rank_pattern):
            if type(value) is not int or value < 1:
                problems.append(f"{name}: a rank is a whole number, at least 1, not {value!r}")
        for name, value in (("alpha", self.alpha), *self.alpha_pattern):
            if type(value) not in (int, float) or not 0 < value < math.inf:
                problems.append(f"{name}: an alpha is a number above 0, not {value!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        if type(self.rslora) is not bool:
            problems.append(f"rslora: True or False, not {self.rslora!r}")
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "q_proj", or "{ALL_LINEAR}"')
        refuse(problems, "LoraConfig:")

    def plan(self, model: nn.Module) -> Plan:
        problems: list[str] = []
        modules: dict[str, list[nn.Module]] = {}  # a wrapper and its base share a name
        for name, _, module in original_modules(model):
            modules.setdefault(name, []).append(module)
        linears = {name: module for name, found in modules.items() for module in found if is_linear(module)}
        names = self._find(modules, linears, problems)
        roots = find(modules, self.trainable, problems, "module (in trainable)")
        whole = original_parameters(model, roots)
        problems += _together(self._misfits(model, names, modules, linears, whole))
        problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
        there = "its linear layers are:\n    " + "\n    ".join(collapse(linears) or ["none"])
        refuse(problems, f"LoRA does not fit this {type(model).__name__}, which is unchanged:", there)

        parameters, adapted = {}, set()
        for name in names:
            base, rank = linears[name], self._rank(name)
            if base not in adapted:  # one layer in two places has one adapter
                adapted.add(base)
                like = {"dtype": adapter_dtype(base), "device": "meta"}
                parameters[f"{name}.lora_A"] = torch.empty(rank, base.in_features, **like)
                parameters[f"{name}.lora_B"] = torch.empty(base.out_features, rank, **like)
        parameters |= {name: torch.empty_like(parameter, device="meta") for name, parameter in whole.items()}
        return Plan(tuple(names), tuple(roots), parameters)

    def _find(self, modules: Mapping, linears: Mapping, problems: list[str]) -> list[str]:
        """The names that the targets and patterns mean; what they do not find goes to `problems`."""
        named = [target for target in self.targets if target != ALL_LINEAR]
        if "" in linears:
            problems.append(
                "it is a linear layer itself, and an adapter takes the place of one inside a model: put it into one, "
                'such as nn.Sequential(layer), with the target "0"'
            )
            return []
        names = find(modules, named, problems, "module", suggest=linears)
        if ALL_LINEAR in self.targets:
            names = [name for name in linears if name in names or name.rpartition(".")[2] not in HEADS]
        for field in ("rank_pattern", "alpha_pattern"):
            find(names, [key for key, _ in getattr(self, field)], problems, f"target (in {field})")
        return names

    def _misfits(self, model: nn.Module, names, modules, linears, whole) -> Iterator[tuple[str, str]]:
        """(name, why it cannot get an adapter)"""
        tied = tied_parameters(model)
        for name in names:
            base = linears.get(name)
            if base is None:
                yield name, f"is a {type(modules[name][0]).__name__}, not a linear layer"
                continue
            if any(isinstance(module, LoRALinear) for module in modules[name]):
                yield name, "already has a LoRA; merge(model) or unload(model) it first"
            if problem := rank_problem(self._rank(name), base):
                yield name, problem
            if f"{name}.weight" in tied:
                yield name, tie(f"{name}.weight", tied)
            if f"{name}.weight" in whole:
                yield name, "is a target and in `trainable`; choose one"
            for other in linears:
                if linears[other] is base and other not in names:
                    yield name, f"is also {other}, which would change too; target both"

    def install(self, model: nn.Module, plan: Plan) -> None:
        def make(name: str, base: nn.Module) -> LoRALinear:
            alpha = _value(self.alpha_pattern, name, self.alpha)
            return LoRALinear(base, self._rank(name), alpha, dropout=self.dropout, rslora=self.rslora)

        replace_modules(model, lambda name, module: name in plan.adapted and is_linear(module), make)

    def _rank(self, name: str) -> int:
        return _value(self.rank_pattern, name, self.rank)

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        targets = plan.adapted if ALL_LINEAR in self.targets else self.targets  # peft knows other heads than we do
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,  # servers expect an int
            "target_modules": list(targets),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": list(plan.whole) or None,  # peft looks at the end of the text, not of the path
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_dora": False,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "LoraConfig":
        rest = {name: value for name, value in fields.items() if name not in PEFT_BOOKKEEPING}
        targets, saved = rest.pop("target_modules", None) or (), rest.pop("modules_to_save", None) or ()
        names = dict.fromkeys(name for name, _, _ in original_modules(model))
        ends = {end: [name for name in names if name.endswith(end)] for end in saved}  # "norm" is "attn_norm" too
        if isinstance(targets, str) and targets != ALL_LINEAR:  # peft reads a text as a regular expression
            names = dict.fromkeys(name for name, _, module in original_modules(model) if is_linear(module))
            targets = [name for name in names if re.fullmatch(targets, name)]
        config = {
            "rank": rest.pop("r", 8),
            "alpha": float(rest.pop("lora_alpha", 8)),
            "targets": (targets,) if isinstance(targets, str) else tuple(targets),
            "dropout": float(rest.pop("lora_dropout", 0.0)),
            "rslora": bool(rest.pop("use_rslora", False)),
            "rank_pattern": tuple((rest.pop("rank_pattern", None) or {}).items()),
            "alpha_pattern": tuple((k, float(v)) for k, v in (rest.pop("alpha_pattern", None) or {}).items()),
            "trainable": tuple(name for end in saved for name in ends[end] or [end]),
        }
        if rest.get("init_lora_weights") in (True, False, "gaussian"):  # the others change the base as well
            rest.pop("init_lora_weights")
        unknown = [f"{name} = {value!r}" for name, value in rest.items() if value and value != "none"]
        refuse(unknown, "the adapter needs what this LoRA cannot do:")
        return cls(**config)


def _pairs(name: str, value: Any, problems: list[str]) -> tuple[tuple[str, Any], ...]:
    """A pattern as a tuple of pairs, from that or a dict; what is neither is a problem."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, list | tuple) and all(
        isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        return tuple((target, number) for target, number in pairs)
    problems.append(f'{name}: targets with a number each, such as {{"v_proj": 4}}, not {value!r}')
    return ()


def _together(problems: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all names that have the same problem."""
    about: dict[str, list[str]] = {}
    for name, problem in problems:
        about.setdefault(problem, []).append(name)
    return [f"{', '.join(collapse(names))}: {problem}" for problem, names in about.items()]


def _value(pairs: Sequence[tuple[str, Value]], name: str, default: Value) -> Value:
    """The value of the first pair whose key is the end of `name`."""
    return next((value for key, value in pairs if f".{name}".endswith(f".{key}")), default)
