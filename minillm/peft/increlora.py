"""IncreLoRA: low-rank adapters that start small and get further ranks during training, where they matter most.

Source: Zhang et al. 2023 (arXiv:2308.12043). The layer is in increlora_linear.py; which layer grows, and when, is
decided in increlora_allocator.py.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillm.peft.increlora_linear import IncreLoRALinear
from minillm.peft.linears import adapter_dtype, features
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_linear import rank_problem
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import innermost, names_of
from minillm.peft.record import Tuning, choose
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import ALL_LINEAR, find_targets


@dataclasses.dataclass(frozen=True)
class IncreLoraConfig(AdapterConfig):
    """Which linear layers get an adapter, how large the adapters are together in the end, and how they get there.

    All start with `rank`. After `warmup` steps, every `interval` steps the `winners` most important layers get
    `reserve` ranks each, until the ranks add up to `target_rank` times the number of layers; no layer gets more than
    `max_rank`. That needs `RankGrowth(model)`, of minillm.training.rank_growth, among the trainer's callbacks; without
    it the ranks stay what they are. It is saved, and loaded again, as the LoRA that it has become.
    Trainable values: max_rank (Din + Dout + 1) for each layer have a place; rank_i (Din + Dout + 1) speak in the end.
    """

    name = "increlora"
    peft_type = "LORA"  # which it is saved as
    title = "Growing low-rank adapters, IncreLoRA"
    paper = "Zhang et al. 2023, arXiv:2308.12043"
    formula = "max_rank (Din + Dout + 1) for each layer, of which rank_i (Din + Dout + 1) speak in the end"

    rank: int = 1
    target_rank: int = 2  # the mean rank in the end
    max_rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    reserve: int = 1  # components of each layer that learn in advance; a winner gets so many ranks
    winners: int = 2
    warmup: int = 100
    interval: int = 100
    beta1: float = 0.85  # of the moving average of the importance
    beta2: float = 0.85  # of the moving average of its deviation
    orthogonality: float = 0.1  # weight of the penalty, as published; 0: none

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "targets", names_of("targets", self.targets, problems))
        least = {"rank": 1, "target_rank": 1, "max_rank": 1, "reserve": 1, "winners": 1, "warmup": 0, "interval": 1}
        for name, low in least.items():
            if type(value := getattr(self, name)) is not int or value < low:
                problems.append(f"{name}: a whole number, at least {low}, not {value!r}")
        for name, end in (("dropout", 1), ("beta1", 1), ("beta2", 1), ("orthogonality", math.inf)):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < end:
                problems.append(f"{name}: a number in [0, {end}), not {value!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            problems.append(f"alpha: a number above 0, not {self.alpha!r}")
        if not problems and not self.rank <= self.target_rank <= self.max_rank:
            problems.append(
                f"rank <= target_rank <= max_rank is needed, not {self.rank}, {self.target_rank}, {self.max_rank}"
            )
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "q_proj", or "{ALL_LINEAR}"')
        return problems

    def plan(self, model: nn.Module) -> Plan:
        found = find_targets(
            model,
            self.targets,
            self.trainable,
            method="IncreLoRA",
            fits=lambda name, layer: rank_problem(self.rank, *features(layer)),
        )
        room = sum(self._most(layer) for layer in found.layers.values())
        budget = self.target_rank * len(found.layers)
        short = f"these layers can have {room} ranks together and target_rank={self.target_rank} means {budget}"
        refuse([short] * (room < budget), "IncreLoRA does not fit; give a smaller target_rank:")
        parameters = {}
        for name, layer in found.layers.items():
            (size_in, size_out), rows = features(layer), self._most(layer)
            for leaf, shape in (("lora_A", (rows, size_in)), ("lora_B", (size_out, rows)), ("lora_E", (rows,))):
                parameters[f"{name}.{leaf}"] = torch.empty(shape, dtype=adapter_dtype(layer), device="meta")
        return found.plan(parameters)

    def _most(self, layer: nn.Module) -> int:
        return min(self.max_rank, *features(layer))

    def install(self, model: nn.Module, plan: Plan) -> None:
        def make(name: str, base: nn.Module) -> IncreLoRALinear:
            most, reserve = self._most(innermost(base)), self.reserve if self.rank < self.target_rank else 0
            return IncreLoRALinear(base, self.rank, self.alpha, max_rank=most, reserve=reserve, dropout=self.dropout)

        wrap_modules(model, plan.adapted, make)

    @property
    def callback(self) -> str:
        return "RankGrowth" if self.rank < self.target_rank else ""

    def penalty(self, tuning: Tuning, mask: Tensor | None) -> Tensor | None:
        """`orthogonality` times the mean of ||A A^T - I|| and ||B^T B - I|| over the layers.

        Over all components of a layer together. The published code sees each added one alone, which fixes its length
        and lets it point where another one does.
        """
        if not self.orthogonality:
            return None
        return self.orthogonality * torch.cat([layer.orthogonality() for layer in tuning.layers.values()]).mean()

    def saved_as(self, tuning: Tuning) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The LoRA that computes the same, and its tensors by the names of its plan: A' = diag(E) A, B' = B."""
        ranks = {name: int(layer.extent[0]) for name, layer in tuning.wrappers}
        pattern = sorted(ranks.items(), key=lambda item: -len(item[0]))  # a longer name before one that is its end
        config = LoraConfig(
            self.target_rank, self.alpha, self.targets, self.dropout, rank_pattern=pattern, trainable=self.trainable
        )
        tensors: dict[str, Tensor] = {}
        for name, layer in tuning.layers.items():
            rank = ranks[name]
            a = layer.lora_E.detach()[:rank, None] * layer.lora_A.detach()[:rank]
            tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": layer.lora_B.detach()[:, :rank].clone()}
        own: Mapping[str, Tensor] = tuning.parameters()
        leaves = (".lora_A", ".lora_B", ".lora_E")
        adapted = {f"{name}{leaf}" for name in ranks for leaf in leaves}
        return config, tensors | {name: p.detach().clone() for name, p in own.items() if name not in adapted}


def export(model: nn.Module, name: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An IncreLoRA on `model` as the LoRA that it has become: its config and its tensors, by original paths."""
    tuning = choose(model, name, "export")
    if not isinstance(tuning.config, IncreLoraConfig):
        raise ValueError(f"{tuning.name!r} is no IncreLoRA but {tuning.config.name}; save_adapter() saves it as it is")
    return tuning.config.saved_as(tuning)
