"""MoLA: mixtures of low-rank adapters, more of them in some layers of the model than in others.

Source: Gao et al. 2024 (arXiv:2402.08562). The layer is in mola_linear.py.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.peft.linears import adapter_dtype, features
from minillm.peft.lora_linear import rank_problem
from minillm.peft.method import AdapterConfig, Plan
from minillm.peft.mola_linear import MoLALinear, expert_problem
from minillm.peft.names import base_modules, join, names_of
from minillm.peft.record import Tuning
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import ALL_LINEAR, find_targets

SHAPES = {  # experts of each quarter of the layers, from the lowest, more or less than the mean; the paper's at 5
    "triangle": (3, 1, -1, -3),  # 8 6 4 2
    "inverted-triangle": (-3, -1, 1, 3),  # 2 4 6 8
    "hourglass": (3, -3, -3, 3),  # 8 2 2 8
    "diamond": (-3, 3, 3, -3),  # 2 8 8 2: more in the middle, which the NAACL 2025 version of the paper finds best
    "rectangle": (0, 0, 0, 0),  # 5 5 5 5
}


@dataclasses.dataclass(frozen=True)
class MolaConfig(AdapterConfig):
    """Which linear layers get experts, and how many depending on the depth of the transformer layer they are in.

    `experts` is the mean and `shape` distributes it over the quarters of the depth: "triangle" (8 6 4 2 at a mean of
    5), "inverted-triangle" (2 4 6 8), "hourglass" (8 2 2 8), "diamond" (2 8 8 2) or "rectangle" (5 5 5 5). All but the
    last need a mean of 4 at least; the mean is exact where 4 divides the number of layers. `per_layer` gives the number
    for each transformer layer instead. The depth is read from the module's path: the first number in it ("layers.3.",
    "h.3.", "encoder.layer.3."), among as many layers as have the same path before the number, so an encoder and a
    decoder are counted each by itself.
    Trainable values: N R (Din + Dout) + N Din for each linear layer, N = experts of its transformer layer.
    """

    name = "mola"
    peft_type = "MINILLM_MOLA"
    title = "Mixture of low-rank experts, MoLA"
    paper = "Gao et al. 2024, arXiv:2402.08562"
    formula = "N R (Din + Dout) + N Din for each layer, N experts by depth"
    cannot_merge = "which experts a token uses depends on the token, so no one weight does what they do"

    experts: int = 5
    shape: Literal["triangle", "inverted-triangle", "hourglass", "diamond", "rectangle"] = "inverted-triangle"
    per_layer: tuple[int, ...] = ()
    top_k: int = 2
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    balance: float = 0.001  # weight of the balance loss; 0: none

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "targets", names_of("targets", self.targets, problems))
        for name in ("experts", "top_k", "rank"):
            if type(value := getattr(self, name)) is not int or value < 1:
                problems.append(f"{name}: a whole number, at least 1, not {value!r}")
        if isinstance(self.per_layer, list | tuple) and all(type(n) is int and n > 0 for n in self.per_layer):
            object.__setattr__(self, "per_layer", tuple(self.per_layer))
        else:
            problems.append(f"per_layer: a whole number, at least 1, for each layer, not {self.per_layer!r}")
        if self.shape not in list(SHAPES):  # a list: what has no hash is in no dict
            problems.append(f"shape: one of {', '.join(SHAPES)}, not {self.shape!r}")
        elif not problems and not self.per_layer and self.experts + min(SHAPES[self.shape]) < 1:
            problems.append(f"experts: a {self.shape} needs a mean of 4 at least, not {self.experts}")
        for name, end in (("dropout", 1), ("balance", math.inf)):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < end:
                problems.append(f"{name}: a number in [0, {end}), not {value!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            problems.append(f"alpha: a number above 0, not {self.alpha!r}")
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "q_proj", or "{ALL_LINEAR}"')
        return problems

    def plan(self, model: nn.Module) -> Plan:
        counts = self._counts(name for name, _, _ in base_modules(model))

        def problem(name: str, layer: nn.Module) -> str | None:
            if isinstance(counts[name], str):
                return counts[name]
            return rank_problem(self.rank, *features(layer)) or expert_problem(counts[name], self.top_k)

        found = find_targets(model, self.targets, self.trainable, method="MoLA", fits=problem)
        parameters = {}
        for name, layer in found.layers.items():
            (size_in, size_out), n, r = features(layer), counts[name], self.rank
            leaves = {"lora_A": (n, r, size_in), "lora_B": (n, size_out, r), "router": (n, size_in)}
            for leaf, shape in leaves.items():
                parameters[f"{name}.{leaf}"] = torch.empty(shape, dtype=adapter_dtype(layer), device="meta")
        return found.plan(parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        counts = self._counts(name for name, _, _ in base_modules(model))

        def make(name: str, base: nn.Module) -> MoLALinear:
            options = {"top_k": self.top_k, "dropout": self.dropout, "remember": self.balance > 0}
            return MoLALinear(base, counts[name], self.rank, self.alpha, **options)

        wrap_modules(model, plan.adapted, make)

    def penalty(self, tuning: Tuning, mask: Tensor | None) -> Tensor | None:
        """`balance` times the sum of the layers' balance losses over the pass before (`MoLALinear.balance`).

        Each router is balanced by itself; the published code pools the routers of a transformer layer, where one can
        hide another's choice, and counts padding. Under DDP each process balances its own tokens, and the gradients'
        mean is what is followed.
        """
        terms = [term for layer in tuning.layers.values() if (term := layer.balance(mask)) is not None]
        return self.balance * torch.stack(terms).sum() if terms else None

    def _counts(self, names: Iterable[str]) -> Mapping[str, int | str]:
        """Each module's number of experts, or why it has none."""
        places = {name: _depth(name) for name in names}
        depths: dict[str, set[int]] = {}
        for stack, depth in filter(None, places.values()):
            depths.setdefault(stack, set()).add(depth)
        return {name: self._count(place, depths) for name, place in places.items()}

    def _count(self, place: tuple[str, int] | None, depths: Mapping[str, set[int]]) -> int | str:
        if place is None:
            if self.shape == "rectangle" and not self.per_layer:
                return self.experts
            return 'is in no numbered layer, which the number of experts follows; give shape="rectangle" to have it too'
        stack, depth = place
        layers = len(depths[stack])
        if not self.per_layer:
            return self.experts + SHAPES[self.shape][_quarter(depth, layers)]
        if len(self.per_layer) != layers:
            return f"per_layer has {len(self.per_layer)} numbers, and {stack or 'the model'} {layers} layers"
        return self.per_layer[depth]


def _quarter(depth: int, layers: int) -> int:
    """Which quarter, 0 to 3; counted from both ends, so that a symmetric shape stays symmetric at any depth."""
    return 4 * depth // layers if 2 * depth < layers else 3 - 4 * (layers - 1 - depth) // layers


def _depth(name: str) -> tuple[str, int] | None:
    """("encoder.layers", 3) of encoder.layers.3.self_attn.q_proj; None where there is no number."""
    stack = ""
    for segment in name.split("."):
        if segment.isdigit():
            return stack, int(segment)
        stack = join(stack, segment)
    return None
