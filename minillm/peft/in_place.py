"""Tuning without adapters: all of the model, or copies of some of its weights."""

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import nn

from minillm.peft.linears import is_quantized
from minillm.peft.method import Method, Plan, refuse
from minillm.peft.names import base_modules, base_parameters, collapse, find, join, names_of, ties_across
from minillm.peft.targets import parameters_in


@dataclasses.dataclass(frozen=True)
class FullConfig(Method):
    """Every floating-point parameter trains. There is no copy of the base: `unload` refuses."""

    name = "full"
    peft_type = "MINILLM_FULL"
    title = "Full fine-tuning"
    formula = "all"
    keeps_base = False

    def plan(self, model: nn.Module) -> Plan:
        parameters = {name: p for name, p in parameters_in(model, [""]).items() if p.is_floating_point()}
        problems = [] if parameters else ["it has no parameters"]
        if coded := [name for name, _, module in base_modules(model) if is_quantized(module)]:
            problems.append(f"{', '.join(collapse(coded))}: quantized weights cannot train; tune the model from before")
        refuse(problems, f"full tuning does not fit this {type(model).__name__}, which is unchanged:")
        return _plan(("the whole model",), parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        """Nothing to insert."""


@dataclasses.dataclass(frozen=True)
class PartialConfig(Method):
    """Some of the model trains, all else is frozen: the head, the last layers, what a pattern finds, or all of these.

    `modules` train in full, such as ("lm_head",). `last` is how many of the last layers of each stack train too, and
    `pattern` a regular expression for whole names of parameters: `.*norm\\.weight` trains the norms.
    A tied head cannot train alone, since the embedding is the same matrix. `untie` gives each tied module named here
    its own copy first: more trained values and a larger file, and the model's own config should say it from then on.
    """

    name = "partial"
    peft_type = "MINILLM_PARTIAL"
    title = "Partial fine-tuning"
    formula = "the values of the named modules"

    modules: tuple[str, ...] = ("lm_head",)
    untie: bool = False
    last: int = 0
    pattern: str = ""

    def __post_init__(self):
        problems: list[str] = []
        object.__setattr__(self, "modules", names_of("modules", self.modules, problems))
        if type(self.untie) is not bool:
            problems.append(f"untie: True or False, not {self.untie!r}")
        if type(self.last) is not int or self.last < 0:
            problems.append(f"last: a number of layers, 0 or more, not {self.last!r}")
        try:
            re.compile(self.pattern if isinstance(self.pattern, str) else None)  # bytes would fit no name
        except (re.error, TypeError) as error:
            problems.append(f"pattern: {self.pattern!r} is no regular expression: {error}")
        refuse(problems, "PartialConfig:")

    def plan(self, model: nn.Module) -> Plan:
        problems: list[str] = []
        modules = {name: module for name, _, module in base_modules(model)}
        names = find(modules, self.modules, problems, "module") + self._last_layers(modules, problems)
        parameters = parameters_in(model, names)
        problems += [f"{name} has no parameters" for name in names if not parameters_in(model, [name])]
        found = {name: p for name, p in base_parameters(model) if self.pattern and re.fullmatch(self.pattern, name)}
        if self.pattern and not found:
            problems.append(f"pattern: {self.pattern!r} matches no parameter; one is {next(base_parameters(model))[0]}")
        if not self.untie:
            hint = ", or give PartialConfig(untie=True) (partial.untie=true)"
            ties = ties_across(model, names, found)
            problems += [f"{name}: {problem}{hint}" for name, problem in ties.items()]
        if not (self.modules or self.last or self.pattern):
            problems.append('name at least one module, such as "lm_head", or give `last` or `pattern`')
        refuse(problems, f"partial tuning does not fit this {type(model).__name__}, which is unchanged:")
        there = {id(p) for p in parameters.values()}
        parameters |= {name: p for name, p in found.items() if id(p) not in there and not there.add(id(p))}
        return _plan(tuple(names), {name: p for name, p in parameters.items() if p.is_floating_point()})

    def _last_layers(self, modules: Mapping[str, nn.Module], problems: list[str]) -> list[str]:
        """The names of the last layers of every stack."""
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)] if self.last else []
        stacks = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
        chosen = []
        for name in stacks:
            if self.last > len(modules[name]):
                problems.append(f"last={self.last}, but {name} has {len(modules[name])} layers")
            chosen += [join(name, str(i)) for i in range(max(0, len(modules[name]) - self.last), len(modules[name]))]
        if self.last and not stacks:
            problems.append(f"last={self.last}: it has no list of layers")
        return chosen

    def install(self, model: nn.Module, plan: Plan) -> None:
        """Untie what is tied with something outside; `tune` copies all else."""
        ties = ties_across(model, plan.whole, plan.parameters)
        for name, _, module in list(base_modules(model)):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if join(name, leaf) in ties:
                    setattr(module, leaf, nn.Parameter(parameter.detach().clone()))


def _plan(whole: tuple[str, ...], parameters: Mapping[str, nn.Parameter]) -> Plan:
    return Plan((), whole, {name: torch.empty_like(p, device="meta") for name, p in parameters.items()})
