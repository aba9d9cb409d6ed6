"""Bottleneck adapters as a method: which sublayers get one, and of what size."""

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from minillm.config import nearest
from minillm.layers import Block
from minillm.ops import ACTIVATIONS
from minillm.peft.bottleneck import Bottleneck
from minillm.peft.linears import adapter_dtype, features, is_linear
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import base_modules, join, names_of
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import find_targets

KINDS = {  # kind -> what follows from it where it is not given
    "houlsby": {"reduction": 16.0, "activation": "silu", "scaling": 1.0},
    "pfeiffer": {"reduction": 16.0, "activation": "relu", "scaling": 1.0},
    "parallel": {"reduction": 2.0, "activation": "relu", "scaling": 4.0},
}
INITS = ("identity", "houlsby", "bert")


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Where adapters stand, and of what size.

    M is `size`, or D / `reduction` rounded down, at least 1. What is None follows from `kind`: reduction 16, silu and
    scaling 1 for "houlsby"; 16, relu, 1 for "pfeiffer"; 2, relu, 4 for "parallel". `init` is "identity", which changes
    nothing at the start; the papers' are "houlsby" (normal of std 0.01, cut at 0.02) and, in AdapterHub, "bert" (0.02).
    `cross_attention` puts one of Houlsby's after cross-attention too, which he did not have and AdapterHub leaves out.
    `leave_out` names blocks by their number, from 0 through the model, an encoder's before its decoder's.
    `targets` are for models of other libraries, whose blocks we do not know: linear layers by the ends of their paths,
    each followed by an adapter ("parallel": beside it). Other modules that return one tensor are allowed once `width`
    says how many features they take and return.
    """

    name: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "MINILLM_BOTTLENECK"
    title: ClassVar[str] = "Bottleneck adapters"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247"
    formula: ClassVar[str] = "2 M D + M + D for each adapter"
    cannot_merge: ClassVar[str] = "a bottleneck adapter is not linear, so no weight of the base can hold it"

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    reduction: float | None = None
    size: int | None = None  # M; instead of reduction
    activation: str | None = None
    scaling: float | None = None
    init: Literal["identity", "houlsby", "bert"] = "identity"
    dropout: float = 0.0
    cross_attention: bool = False
    leave_out: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.init != "identity":  # said beside the fields, as the class does
            object.__setattr__(self, "start", f"init={self.init!r} starts near the identity, not at it")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "targets", names_of("targets", self.targets, problems))
        choices = {"kind": tuple(KINDS), "init": INITS, "activation": (None, *ACTIVATIONS)}
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                problems.append(f"{field}={value!r}: did you mean {nearest(str(value), filter(None, known))}?")
        for field in ("reduction", "scaling", "size", "width"):
            whole, value = field in ("size", "width"), getattr(self, field)
            right = type(value) in ((int,) if whole else (int, float)) and 0 < value < math.inf
            if value is not None and not right:
                problems.append(f"{field}={value!r}: a {'whole ' if whole else ''}number above 0")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        if type(self.cross_attention) is not bool:
            problems.append(f"cross_attention: True or False, not {self.cross_attention!r}")
        numbers = isinstance(self.leave_out, list | tuple) and all(type(n) is int and n >= 0 for n in self.leave_out)
        problems += [] if numbers else [f"leave_out: numbers of blocks from 0, such as (0, 1), not {self.leave_out!r}"]
        problems += self._conflicts()
        if not problems:
            object.__setattr__(self, "leave_out", tuple(self.leave_out))
            for field, value in KINDS[self.kind].items():
                if getattr(self, field) is None and not (field == "reduction" and self.size is not None):
                    object.__setattr__(self, field, value)
        return problems

    def _conflicts(self) -> list[str]:
        wrong = []
        if self.size is not None and self.reduction is not None:
            wrong.append("size and reduction both say how wide the bottleneck is: give one")
        if self.cross_attention and self.kind != "houlsby":
            wrong.append(f"cross_attention is for kind='houlsby'; {self.kind!r} is at the MLP only")
        if self.targets and self.kind == "pfeiffer":
            wrong.append(
                "kind='pfeiffer' reads a block's norm, and targets name no norms: kind='houlsby', activation='relu' "
                "with the last layer of each MLP as target is the same but for that norm"
            )
        if self.targets and (self.leave_out or self.cross_attention):
            wrong.append("leave_out and cross_attention are about blocks; with targets, name fewer or more targets")
        if self.width is not None and not self.targets:
            wrong.append("width is for targets that are no linear layers; blocks say their width themselves")
        return wrong

    def plan(self, model: nn.Module) -> Plan:
        sublayers = {} if self.targets else self._sublayers(model)
        own = {id(module) for module, _ in sublayers.values()}
        found = find_targets(
            model,
            self.targets or tuple(sublayers),
            self.trainable,
            method=f"the {self.kind} adapter",
            kind=lambda module: (
                id(module) in own if own else is_linear(module) or (self.width is not None and module is not model)
            ),
            kind_name="sublayer" if own else "linear layer" if self.width is None else "module",
            fits=_holds_our_names,
        )
        parameters: dict[str, Tensor] = {}
        for name, module in found.layers.items():
            din, dout = self._features(module) if self.targets else sublayers[name][1:] * 2
            size = self.size or max(1, int(dout // self.reduction))
            like = {"dtype": adapter_dtype(_weighted(module, model)), "device": "meta"}
            for leaf, rows, columns in (("down", size, din), ("up", dout, size)):
                parameters[f"{name}.{leaf}.weight"] = torch.empty(rows, columns, **like)
                parameters[f"{name}.{leaf}.bias"] = torch.empty(rows, **like)
        return found.plan(parameters)

    def install(self, model: nn.Module, plan: Plan) -> None:
        blocks = _blocks(model)

        def make(name: str, base: nn.Module) -> Bottleneck:
            block = blocks.get(name.rpartition(".")[0])
            adapter = Bottleneck(
                base,
                (*reversed(plan.parameters[f"{name}.down.weight"].shape), len(plan.parameters[f"{name}.up.bias"])),
                activation=self.activation,
                scaling=self.scaling,
                dropout=self.dropout,
                beside=self.kind == "parallel",
                block=None if self.kind != "pfeiffer" or block.norm_first else block,
                like=_weighted(base, model),
            )
            adapter.reset_parameters(self.init)
            return adapter

        wrap_modules(model, plan.adapted, make)

    def _sublayers(self, model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
        """Name -> (sublayer that gets an adapter, its width D), of the model's blocks."""
        own = {name: module for name, _, module in base_modules(model)}
        parts = ["self_attn"] * (self.kind == "houlsby") + ["cross_attn"] * self.cross_attention + ["mlp"]
        blocks = _blocks(model)
        chosen = [name for i, name in enumerate(blocks) if i not in self.leave_out]
        names = [join(name, part) for name in chosen for part in parts if join(name, part) in own]
        problems = [] if blocks else ["it has no block of ours; name its layers in `targets`"]
        if beyond := [number for number in self.leave_out if blocks and number >= len(blocks)]:
            problems.append(f"leave_out={beyond}: its {len(blocks)} blocks have the numbers 0..{len(blocks) - 1}")
        if self.cross_attention and blocks and not any(name.endswith("cross_attn") for name in names):
            problems.append("cross_attention: none of its blocks that get adapters has any")
        problems += ["leave_out leaves no block"] if blocks and not chosen else []
        refuse(problems, f"the {self.kind} adapter does not fit this {type(model).__name__}, which is unchanged:")
        return {name: (own[name], own[join(name.rpartition(".")[0], "mlp_norm")].weight.numel()) for name in names}

    def _features(self, module: nn.Module) -> tuple[int, int]:
        """(Din, Dout) of the adapter at a target."""
        din, dout = features(module) if is_linear(module) else (self.width, self.width)
        return din if self.kind == "parallel" else dout, dout


def _blocks(model: nn.Module) -> dict[str, Block]:
    return {name: module for name, _, module in base_modules(model) if isinstance(module, Block)}


def _holds_our_names(name: str, module: nn.Module) -> str | None:
    held = [child for child, _ in module.named_children() if child in ("down", "up")]
    return f"holds a module {held[0]!r} itself, as the adapter would; target that one" if held else None


def _weighted(module: nn.Module, model: nn.Module) -> nn.Module:
    """What tells the adapter its dtype and device: the model, where the module has no weights."""
    return module if any(True for _ in module.parameters()) else model
