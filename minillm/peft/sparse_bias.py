"""Training single entries of biases: those that `prune_bitfit` found worth it.

Source: Lawton et al. 2023 (arXiv:2305.16597), unstructured pruning of BitFit.
"""

import dataclasses

import torch
from torch import Tensor, nn

from minillm.layers import LayerNorm
from minillm.peft.linears import adapter_dtype, device_of, features, is_linear
from minillm.peft.method import AdapterConfig, CannotMerge, Plan, refuse
from minillm.peft.names import Wrapper, base_modules, find, innermost, inside, tied_parameters, ties_across
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import parameters_in


class SparseBias(Wrapper):
    """base(x) plus a trained change of some entries of its bias, zero at the start; the others cannot change.

    The values are changes from the pretrained bias, float32 at least, so weight decay draws towards that one.
    """

    def __init__(self, base: nn.Module, entries: tuple[int, ...]):
        super().__init__()
        layer = innermost(base)
        where = {"device": device_of(layer)}
        self.base, self.size = base, _size(layer)
        self.register_buffer("entries", torch.tensor(entries, **where), persistent=False)  # the config has them
        self.bias_delta = nn.Parameter(torch.zeros(len(entries), dtype=adapter_dtype(layer), **where))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self._dense()).to(y.dtype)

    def _dense(self) -> Tensor:
        return self.bias_delta.new_zeros(self.size).index_copy(0, self.entries, self.bias_delta)

    @property
    def weight(self) -> Tensor:
        """The base's, for code that reads weight and bias instead of calling the layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        """The merged bias, added in float32 at least and rounded once."""
        if self.base.bias is None:
            return self._dense().to(self.weight.dtype)
        return (self.base.bias + self._dense()).to(self.base.bias.dtype)

    def folded(self) -> dict[str, Tensor]:
        """The merged bias."""
        if self.base.bias is None:
            raise CannotMerge("the layer has no bias that a trained change could be folded into")
        return {"bias": self.bias}

    def extra_repr(self) -> str:
        return f"{len(self.entries)} of {self.size} entries"


@dataclasses.dataclass(frozen=True)
class PrunedBitFitConfig(AdapterConfig):
    """Which entries of which biases train: (("layers.0.mlp.up_proj.bias", (3, 17)), ...), by full paths.

    What is not named keeps its pretrained value. Biases of linear layers (where there is none, a zero one is meant) and
    of layer norms. The file has one number for each entry.
    """

    name = "pruned_bitfit"
    peft_type = "MINILLM_PRUNED_BITFIT"
    title = "Pruned biases"
    paper = "Lawton et al. 2023, arXiv:2305.16597"
    formula = "the number of kept entries"

    kept: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        try:
            kept = tuple((str(name), tuple(entries)) for name, entries in self.kept)
        except (TypeError, ValueError):
            return [*problems, f"kept: names with a tuple of places each, not {self.kept!r}"]
        object.__setattr__(self, "kept", kept)
        for name, entries in kept:
            if not _rising(entries):
                problems.append(f"kept: {name}: rising places from 0, at least one, not {entries!r}")
        if len(dict(kept)) < len(kept):
            problems.append("kept: a bias is named twice")
        return problems

    def plan(self, model: nn.Module) -> Plan:
        problems = [] if self.kept else ["kept: no bias is named; BiasScores(model).keep_entries(...) names the best"]
        modules = {name: layer for name, _, layer in base_modules(model)}
        roots = find(modules, self.trainable, problems, "module (in trainable)")
        tied, parameters, adapted = tied_parameters(model), {}, []
        for name, entries in self.kept:
            path, _, leaf = name.rpartition(".")
            layer = modules.get(path)
            if leaf != "bias" or layer is None or (size := _size(layer)) is None:
                problems.append(f"{name} is no bias of a linear layer or layer norm")
            elif entries[-1] >= size:
                problems.append(f"{name} has {size} entries: there is no place {entries[-1]}")
            elif name in tied or inside(name, roots):
                other = "tied with another parameter" if name in tied else "in `trainable` too, where all of it trains"
                problems.append(f"{name} is {other}")
            elif path in adapted:
                problems.append(f"{name} is a bias that is named already, of a layer in several places")
            else:
                like = {"dtype": adapter_dtype(layer), "device": "meta"}
                parameters[f"{path}.bias_delta"] = torch.empty(len(entries), **like)
                adapted += [other for other, module in modules.items() if module is layer]  # also where it is shared
        problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
        refuse(problems, f"these entries do not fit this {type(model).__name__}, which is unchanged:")
        whole = {name: torch.empty_like(p, device="meta") for name, p in parameters_in(model, roots).items()}
        return Plan(tuple(adapted), tuple(roots), parameters | whole)

    def install(self, model: nn.Module, plan: Plan) -> None:
        layers = {name: layer for name, _, layer in base_modules(model)}
        entries = {id(layers[name.rpartition(".")[0]]): places for name, places in self.kept}
        wrap_modules(model, plan.adapted, lambda name, base: SparseBias(base, entries[id(layers[name])]))


def _rising(places: tuple[int, ...]) -> bool:
    whole = all(type(place) is int and place >= 0 for place in places)
    return bool(places) and whole and list(places) == sorted(set(places))


def _size(layer: nn.Module) -> int | None:
    """How many entries the layer's bias has or would have; None for layers that do more to it than add it."""
    if is_linear(layer):
        return features(layer)[1]
    norm = isinstance(layer, nn.LayerNorm | LayerNorm) and layer.weight is not None and layer.weight.dim() == 1
    return layer.weight.numel() if norm else None
