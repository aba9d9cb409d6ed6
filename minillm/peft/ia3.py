"""(IA)3: a learned factor on each feature of keys, values and the MLP's inner activations.

Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3: softmax(Q (l_k * K)^T) (l_v * V), and (l_ff * act(x W1)) W2.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.linears import adapter_dtype, device_of, features, is_conv1d, is_linear
from minillm.peft.lora import PEFT_BOOKKEEPING
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import Wrapper, base_modules, find, innermost, names_of
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import ALL_LINEAR, find_targets, without_doubles


class IA3Linear(Wrapper):
    """l * base(x), or base(l * x) with `feedforward`; l is 1 at the start, so nothing changes.

    The factors are float32 at least, also on a bfloat16 base, and have the shape that peft gives them: (Dout, 1) on the
    output, (1, Din) on the input. A factor on the output scales the layer's bias too.
    """

    def __init__(self, base: nn.Module, *, feedforward: bool = False):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        layer = innermost(base)
        d_in, d_out = features(layer)
        self.transposed = is_conv1d(layer)
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.ia3_l = nn.Parameter(torch.ones((1, d_in) if feedforward else (d_out, 1), **where))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((x * factors).to(x.dtype))
        y = self.base(x)
        return (y * factors).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The merged weight, multiplied in float32 at least and rounded once.

        Code that reads a layer's weight instead of calling the layer (a loss fused with the output head,
        nn.MultiheadAttention) is thereby right too, and sends gradients to the factors.
        """
        return _scaled(self.base.weight, self.ia3_l.mT if self.transposed else self.ia3_l)

    @property
    def bias(self) -> Tensor | None:
        """The merged bias; factors on the input leave it as it is."""
        bias = self.base.bias
        return bias if bias is None or self.feedforward else _scaled(bias, self.ia3_l.flatten())

    def folded(self) -> dict[str, Tensor]:
        """The base's tensors that merging changes, with their new values."""
        scaled = {"weight": self.weight}
        if self.bias is not None and not self.feedforward:
            scaled["bias"] = self.bias
        return scaled

    def extra_repr(self) -> str:
        return "feedforward" if self.feedforward else ""


@dataclasses.dataclass(frozen=True)
class Ia3Config(AdapterConfig):
    """Which linear layers get factors: on the input where the layer is one of `feedforward`, else on the output.

    A target is the end of a module's path, whole segments ("k_proj", "mlp.down_proj"), or "all-linear"; `feedforward`
    names some of the targets in the same way. Scaling the down projection's input scales the MLP's inner activations.
    """

    name = "ia3"
    peft_type = "IA3"
    title = "Learned factors, (IA)3"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    formula = "Dout for each layer, Din instead for those in feedforward"

    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name in ("targets", "feedforward"):
            object.__setattr__(self, name, names_of(name, getattr(self, name), problems))
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "k_proj", or "{ALL_LINEAR}"')
        return problems

    def plan(self, model: nn.Module) -> Plan:
        found = find_targets(
            model, self.targets, self.trainable, method="(IA)3", among={"feedforward": self.feedforward}
        )
        parameters = {}
        for name, layer in found.layers.items():
            d_in, d_out = features(layer)
            shape = (1, d_in) if self._is_feedforward(name) else (d_out, 1)
            parameters[f"{name}.ia3_l"] = torch.empty(shape, dtype=adapter_dtype(layer), device="meta")
        return found.plan(parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        wrap_modules(model, plan.adapted, lambda name, base: IA3Linear(base, feedforward=self._is_feedforward(name)))

    def _is_feedforward(self, name: str) -> bool:
        return bool(find([name], self.feedforward, [], ""))

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        inner = [name for name in plan.adapted if self._is_feedforward(name)]
        targets, feedforward = self.targets, self.feedforward
        if ALL_LINEAR in targets or not set(feedforward) <= set(targets):  # peft wants a subset, word for word
            targets, feedforward = plan.adapted, inner
        loose = [name for name in plan.adapted if name.endswith(tuple(feedforward))]
        return {
            "target_modules": list(targets),
            # peft looks at the end of the text, not of the path; a text is a regular expression to it
            "feedforward_modules": list(feedforward) if loose == inner else "|".join(map(re.escape, inner)),
            "modules_to_save": list(plan.whole) or None,
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "Ia3Config":
        rest = {name: value for name, value in fields.items() if name not in PEFT_BOOKKEEPING}
        rest.pop("init_ia3_weights", None)  # the file has the values
        targets, inner = rest.pop("target_modules", None) or (), rest.pop("feedforward_modules", None) or ()
        saved = rest.pop("modules_to_save", None) or ()
        refuse(
            [f"{name} = {value!r}" for name, value in rest.items() if value],
            "the adapter needs what this (IA)3 cannot do:",
        )
        names = dict.fromkeys(name for name, _, _ in base_modules(model))
        linears = [name for name, _, module in base_modules(model) if is_linear(module)]
        if isinstance(targets, str) and targets != ALL_LINEAR:
            targets = [name for name in linears if re.fullmatch(targets, name)]
        targets = (targets,) if isinstance(targets, str) else tuple(without_doubles(targets))
        adapted = linears if ALL_LINEAR in targets else find(linears, targets, [], "")
        if isinstance(inner, str):
            inner = [name for name in adapted if re.fullmatch(inner, name)]
        elif (loose := [name for name in adapted if name.endswith(tuple(inner))]) != find(adapted, inner, [], ""):
            inner = loose
        trainable = tuple(name for end in saved for name in [n for n in names if n.endswith(end)] or [end])
        return cls(targets, tuple(inner), trainable=trainable)


def _scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, factors.dtype)
    return (tensor.to(wide) * factors.to(wide)).to(tensor.dtype)
