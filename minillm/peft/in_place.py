"""Tuning without adapters: all of the model, or some of its modules. The trained weights replace the base's own."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from minillm.peft.method import Method, Plan, refuse
from minillm.peft.names import find, join, names_of, original_modules, original_parameters, ties_across


@dataclasses.dataclass(frozen=True)
class FullConfig(Method):
    """Every floating-point parameter trains."""

    name = "full"
    peft_type = "MINILLM_FULL"

    def plan(self, model: nn.Module) -> Plan:
        parameters = {name: p for name, p in original_parameters(model).items() if p.is_floating_point()}
        refuse([] if parameters else ["it has no parameters"], f"nothing to tune in this {type(model).__name__}:")
        return _plan(("the whole model",), parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        """Nothing to insert."""


@dataclasses.dataclass(frozen=True)
class PartialConfig(Method):
    """The named modules train in full, such as ("lm_head",), or ("layers.5", "norm", "lm_head"): the last layers.

    A tied head cannot train alone, since the embedding is the same matrix. `untie` gives each tied module named here
    its own copy first: more trained values and a larger file, and the model's own config should say it from then on.
    """

    name = "partial"
    peft_type = "MINILLM_PARTIAL"

    modules: tuple[str, ...] = ("lm_head",)
    untie: bool = False

    def __post_init__(self):
        problems: list[str] = []
        object.__setattr__(self, "modules", names_of("modules", self.modules, problems))
        if type(self.untie) is not bool:
            problems.append(f"untie: True or False, not {self.untie!r}")
        refuse(problems, "PartialConfig:")

    def plan(self, model: nn.Module) -> Plan:
        problems: list[str] = []
        names = find((name for name, _, _ in original_modules(model)), self.modules, problems, "module")
        parameters = original_parameters(model, names)
        for name in names:
            if not original_parameters(model, [name]):
                problems.append(f"{name} has no parameters")
        if not self.untie:
            hint = ", or give PartialConfig(untie=True) (partial.untie=true)"
            problems += [f"{name}: {problem}{hint}" for name, problem in ties_across(model, names).items()]
        if self.modules == ():
            problems.append('name at least one module, such as "lm_head"')
        refuse(problems, f"partial tuning does not fit this {type(model).__name__}, which is unchanged:")
        return _plan(tuple(names), parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        """Copy what is tied with something outside; all else trains where it stands."""
        ties = ties_across(model, plan.whole)
        for name, _, module in list(original_modules(model)):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if join(name, leaf) in ties:
                    setattr(module, leaf, nn.Parameter(parameter.detach().clone()))


def _plan(whole: tuple[str, ...], parameters: Mapping[str, nn.Parameter]) -> Plan:
    return Plan((), whole, {name: torch.empty_like(p, device="meta") for name, p in parameters.items()})
