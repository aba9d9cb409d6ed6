"""QA-LoRA: a low-rank update that can be merged into a 4-bit base, whose codes stay what they are.

Source: Xu et al. 2023 (arXiv:2309.14717). The base is scale * (codes - zero) with one scale and zero for each group of
G inputs (and each output), so an update that is constant over each group is a change of the zeros.
"""

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor, nn

from minillm.ops import lora
from minillm.ops.int4 import Int4Tensor, quantize_int4
from minillm.ops.quantize import check_size
from minillm.peft.linears import adapter_dtype, device_of, features, is_conv1d, is_linear, is_quantized
from minillm.peft.lora_linear import rank_problem
from minillm.peft.method import AdapterConfig, Plan
from minillm.peft.names import Wrapper, base_modules, innermost, names_of
from minillm.peft.quantized_linear import put_back, replace_quantized
from minillm.peft.record import record_of
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import ALL_LINEAR, find_targets


class QALoRALinear(Wrapper):
    """base(x) + scale * B A dropout(pooled), with pooled (L) the sums of x (Din) over its groups, L = Din / G.

    A (R, L) is random and B (Dout, R) zero: at first nothing changes. It equals a LoRA whose A repeats each column G
    times, and starts as that LoRA does: within 1 / sqrt(Din) of 0, a factor sqrt(G) less than by A's own size.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0):
        super().__init__()
        layer = innermost(base)
        self.base, self.rank, self.scale, self.group = base, rank, alpha / rank, layer.quantized.group
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(layer.in_features)
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features // self.group, **where).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, **where))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1, dtype=self.lora_A.dtype)
        return lora(self.base(x), self.dropout(pooled), self.lora_A, self.lora_B, self.scale)

    @property
    def weight(self) -> Tensor:
        """The weight with its update, summed in float32 at least and rounded once; see LoRALinear.weight."""
        base = self.base.weight
        wide = torch.promote_types(base.dtype, self.lora_A.dtype)
        update = (self.scale * self.lora_B.to(wide) @ self.lora_A.to(wide)).repeat_interleave(self.group, 1)
        return (base.to(wide) + update).to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def folded(self) -> dict[str, Tensor]:
        """The zeros with the update in them: scale_g (q - zero) + u = scale_g (q - (zero - u / scale_g))."""
        if not is_quantized(self.base):  # an adapter below has made it a plain layer
            return {"weight": self.weight}
        update = self.scale * self.lora_B.double() @ self.lora_A.double()
        return {"zero": (self.base.zero.double() - update / self.base.scale.double()).to(self.base.zero.dtype)}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, group={self.group}"


@dataclasses.dataclass(frozen=True)
class QaLoraConfig(AdapterConfig):
    """Which linear layers are quantized to 4 bits in groups of `group` inputs, and get a QA-LoRA of what size.

    A target is the end of a module's path, whole segments, or "all-linear": every linear layer but the output head.
    Trainable values: R (Din / G + Dout), summed over the layers: about half of LoRA's.

    The input is *summed* over each group. In the wild there are three conventions: this one, the paper's; the mean, in
    the authors' code (G times smaller, so alpha means something else there); and the mean times the number of groups L,
    in Hugging Face peft (which equals the sum only where G = L, and cannot be merged).

    `merge` is exact and leaves 4-bit layers whose codes are bit for bit those from before, and only the zeros changed.
    `unload` gives the quantized base back. The file belongs to the same float base, which is quantized anew on loading.
    """

    name = "qalora"
    peft_type = "MINILLM_QALORA"
    title = "Low-rank adapters that merge into 4 bits"
    paper = "Xu et al. 2023, arXiv:2309.14717"
    formula = "R (Din / G + Dout) for each layer"
    start = "the base's weights are rounded to 4 bits"
    stacks = "any, if it comes first"
    changes_base = True

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    group: int = 32
    dropout: float = 0.0

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "targets", names_of("targets", self.targets, problems))
        if type(self.rank) is not int or self.rank < 1:
            problems.append(f"rank: a whole number, at least 1, not {self.rank!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            problems.append(f"alpha: a number above 0, not {self.alpha!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "q_proj", or "{ALL_LINEAR}"')
        try:
            check_size("group", self.group)
        except ValueError as error:
            problems.append(str(error))
        return problems

    def plan(self, model: nn.Module) -> Plan:
        fits = self._fits if record_of(model) is None else self._fits_adapted
        common = math.gcd(*(features(layer)[0] for _, _, layer in base_modules(model) if is_linear(layer)))
        found = find_targets(model, self.targets, self.trainable, method="QA-LoRA", fits=partial(fits, common))
        parameters = {}
        for name, layer in found.layers.items():
            like = {"dtype": adapter_dtype(layer), "device": "meta"}
            parameters[f"{name}.lora_A"] = torch.empty(self.rank, layer.in_features // self.group, **like)
            parameters[f"{name}.lora_B"] = torch.empty(layer.out_features, self.rank, **like)
        return found.plan(parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        layers = {n: own for n, _, own in base_modules(model) if n in plan.adapted and not is_quantized(own)}
        made = replace_quantized(model, layers, partial(quantize_int4, group=self.group))
        try:
            wrap_modules(model, plan.adapted, self._wrap)
        except BaseException:
            put_back(model, made)
            raise

    def _wrap(self, name: str, base: nn.Module) -> QALoRALinear:
        return QALoRALinear(base, self.rank, self.alpha, dropout=self.dropout)

    def _fits(self, common: int, name: str, layer: nn.Module) -> str | None:
        """Why a layer cannot be quantized in groups and adapted; `common` divides the inputs of all layers."""
        if is_conv1d(layer):
            return "is transformers' Conv1D; only nn.Linear can be quantized"
        if is_quantized(layer):
            kept = layer.quantized
            if not isinstance(kept, Int4Tensor) or kept.group != self.group:
                return f"is quantized already, but not in groups of {self.group} inputs with a zero each"
        if layer.in_features % self.group:
            fitting = [group for group in range(2, self.group, 2) if common % group == 0]
            advice = f"group={fitting[-1]} (qalora.group={fitting[-1]}) fits" if fitting else "leave such `targets` out"
            return f"has {layer.in_features} inputs, which groups of {self.group} do not divide: {advice}"
        return rank_problem(self.rank, layer.in_features // self.group, layer.out_features)

    def _fits_adapted(self, common: int, name: str, layer: nn.Module) -> str | None:
        """The same on a model with adapters, whose base must not change."""
        if not is_quantized(layer):
            return "has adapters in its model, whose base would change; merge(model) or unload(model) them first"
        return self._fits(common, name, layer)
