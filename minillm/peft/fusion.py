"""AdapterFusion: at each place, attention over what several frozen bottleneck adapters would add there.

Source: Pfeiffer et al. 2020 (arXiv:2005.00247), section 3.2. With h what the adapters read, s what they stand behind,
and u_i what adapter i would add to s:
    s + sum_i p_i V u_i,   p = softmax_i((Q h) . (K u_i))
The scores are not divided by sqrt(D), as in the paper and in AdapterHub.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.peft.bottleneck import Bottleneck
from minillm.peft.bottleneck_config import BottleneckConfig
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import Wrapper, base_modules, names_of
from minillm.peft.record import Tuning, tunings_of
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import find_targets


class Fusion(Wrapper):
    """The adapters `adapters`, which stand around one another in `base`, side by side.

    Their own forwards are not called: each is asked what it would add to the output of the module below them all.
    That keeps nothing and changes nothing in them, so without the fusion they stand on one another as before.
    Their dropout is left out, and `dropout` acts on the scores.
    """

    def __init__(self, base: Bottleneck, adapters: tuple[str, ...], *, dropout: float = 0.0):
        super().__init__()
        self.base, self.adapters, self.dropout = base, adapters, nn.Dropout(dropout)
        width, where = base.up.out_features, {"dtype": base.up.weight.dtype, "device": base.up.weight.device}
        self.query, self.key = nn.Linear(width, width, **where), nn.Linear(width, width, **where)
        self.value = nn.Linear(width, width, bias=False, **where)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Q and K from N(0, 0.02), biases 0; V is 1 on its diagonal and 1e-6 elsewhere."""
        for layer in (self.query, self.key):
            layer.weight.normal_(std=0.02)
            layer.bias.zero_()
        self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, x: Float[Tensor, "*B D"], *args: Any, **kwargs: Any) -> Float[Tensor, "*B D"]:
        fused, below = self._fused()
        s = below(x, *args, **kwargs)
        h = fused[0].read(x, s)
        u = torch.stack([adapter.update(h) for adapter in fused], dim=-2)  # (*B, N, D)
        scores = (self.key(u) @ self.query(h.to(u.dtype)).unsqueeze(-1)).squeeze(-1)  # (*B, N)
        p = self.dropout(scores).softmax(-1)
        mixed = (p.unsqueeze(-2) @ self.value(u)).squeeze(-2)
        return (s + mixed).to(s.dtype)

    def penalty(self) -> Tensor:
        """How far V is from the identity, sum (I - V)^2."""
        v = self.value.weight
        return (torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum()

    def _fused(self) -> tuple[list[Bottleneck], nn.Module]:
        """The adapters in the order of their names, and what is below them."""
        chain, below = stack(self.base, len(self.adapters))
        if set(chain) != set(self.adapters):
            raise ValueError(
                f"this fusion reads the adapters {', '.join(map(repr, self.adapters))}, and directly below it stand "
                f"{', '.join(map(repr, chain)) or 'none'}: activate all of them together with it, and nothing between"
            )
        return [chain[name] for name in self.adapters], below


def stack(module: nn.Module, most: int) -> tuple[dict[str, Bottleneck], nn.Module]:
    """At most `most` bottleneck adapters that stand around one another at `module`, by name; and what is below."""
    chain: dict[str, Bottleneck] = {}
    while isinstance(module, Bottleneck) and len(chain) < most:
        chain[module.adapter], module = module, module.base
    return chain, module


@dataclasses.dataclass(frozen=True)
class FusionConfig(AdapterConfig):
    """Which bottleneck adapters of the model are fused; they, and the base, are frozen.

    Each of them is put on the base alone, and then all are activated:
        tune(model, BottleneckConfig("pfeiffer"), "a"); train it; activate(model)
        tune(model, BottleneckConfig("pfeiffer"), "b"); train it; activate(model, "a", "b")
        tune(model, FusionConfig(("a", "b")), "both")
    They may differ in size, not in where they stand and what they read; parallel ones have no place of their own in
    the residual stream, and no fusion. `regularization` times sum (I - V)^2 is added to the loss (`auxiliary_loss`).
    `dropout` is on the scores; AdapterHub takes that of the model's attention.
    """

    name: ClassVar[str] = "fusion"
    peft_type: ClassVar[str] = "MINILLM_FUSION"
    title: ClassVar[str] = "AdapterFusion"
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00247"
    formula: ClassVar[str] = "3 D^2 + 2 D for each place of the adapters"
    cannot_merge: ClassVar[str] = "what a fusion adds depends on its input, so no weight of the base can hold it"
    stacks: ClassVar[str] = "any; directly above the bottleneck adapters it fuses"
    start: ClassVar[str] = "it averages adapters, almost evenly at first, where each alone or none was before"

    adapters: tuple[str, ...] = ("a", "b")
    dropout: float = 0.0
    regularization: float = 0.01

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "adapters", names_of("adapters", self.adapters, problems))
        if self.adapters is not None and (len(self.adapters) < 2 or len(set(self.adapters)) < len(self.adapters)):
            problems.append(f"adapters: at least two names, each once, not {self.adapters!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        if type(self.regularization) not in (int, float) or not 0 <= self.regularization < float("inf"):
            problems.append(f"regularization: a number, at least 0, not {self.regularization!r}")
        return problems

    @property
    def stands_on(self) -> tuple[str, ...]:
        return self.adapters

    def plan(self, model: nn.Module) -> Plan:
        problems = self._missing(model)
        chains = {} if problems else self._chains(model, problems)
        own = {name: module for name, _, module in base_modules(model)}
        refuse(problems, f"AdapterFusion does not fit this {type(model).__name__}, which is unchanged:")
        places = {id(own[name]) for name in chains}
        found = find_targets(
            model,
            tuple(chains),
            self.trainable,
            method="AdapterFusion",
            kind=lambda module: id(module) in places,
            kind_name="place of adapters",
        )
        parameters: dict[str, Tensor] = {}
        for name in found.layers:
            up = next(iter(chains[name].values())).up
            matrix = torch.empty(up.out_features, up.out_features, dtype=up.weight.dtype, device="meta")
            for leaf in ("query", "key"):
                parameters |= {f"{name}.{leaf}.weight": matrix, f"{name}.{leaf}.bias": matrix[0]}
            parameters[f"{name}.value.weight"] = matrix
        return found.plan(parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        def make(name: str, base: nn.Module) -> Fusion:
            fusion = Fusion(base, self.adapters, dropout=self.dropout)
            fusion.reset_parameters()
            return fusion

        wrap_modules(model, plan.adapted, make)

    def penalty(self, tuning: Tuning, mask: Tensor | None) -> Tensor | None:
        penalties = [fusion.penalty() for fusion in tuning.layers.values()]
        return self.regularization * sum(penalties) if penalties and self.regularization else None

    def _missing(self, model: nn.Module) -> list[str]:
        """What keeps the named adapters from being fused, without looking at the places."""
        tunings, problems = tunings_of(model), []
        for name in self.adapters:
            tuning = tunings.get(name)
            if tuning is None:
                there = ", ".join(map(repr, tunings)) or "none"
                problems.append(f"there is no adapter {name!r} on the model (it has {there}): tune or load it first")
            elif not isinstance(tuning.config, BottleneckConfig) or tuning.config.kind == "parallel":
                is_one = "a parallel one" if isinstance(tuning.config, BottleneckConfig) else f"a {tuning.config.name}"
                problems.append(f"{name!r} is {is_one}: a fusion is of Houlsby's or Pfeiffer's bottleneck adapters")
            elif not tuning.active:
                problems.append(f"{name!r} is not active; activate all of {', '.join(map(repr, self.adapters))} first")
            elif under := set(tuning.under) & set(self.adapters):
                problems.append(
                    f"{name!r} was trained on top of {', '.join(map(repr, sorted(under)))}, and side by side it would "
                    "read something else: activate(model) before adding each, so that they stand on the base alone"
                )
        return problems

    def _chains(self, model: nn.Module, problems: list[str]) -> dict[str, dict[str, Bottleneck]]:
        """Name of each place -> the adapters there by name; all must stand at the same places, outermost."""
        tunings = tunings_of(model)
        places = {name: frozenset(tunings[name].plan.adapted) for name in self.adapters}
        if len(set(places.values())) > 1:
            problems.append("they stand at different places: give all the same kind, leave_out and targets")
            return {}
        outermost = {name: outer for name, outer, _ in base_modules(model)}
        chains = {
            name: stack(outermost[name], len(self.adapters))[0] for name in tunings[self.adapters[0]].plan.adapted
        }
        between = dict.fromkeys(other for chain in chains.values() for other in chain if other not in self.adapters)
        if between or any(len(chain) < len(self.adapters) for chain in chains.values()):
            problems.append(
                f"other adapters stand on them ({', '.join(between) or 'of another method'}): activate fewer"
            )
        if any(len({(a.within, a.up.out_features) for a in chain.values()}) > 1 for chain in chains.values()):
            problems.append("they read different things at one place: give all the same kind")
        return chains
