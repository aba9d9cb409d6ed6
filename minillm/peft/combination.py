"""Weighted sums of LoRA adapters as one new adapter, with the error of what is not exact."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.config import nearest
from minillm.peft.bank import lora_layers
from minillm.peft.lora import LoraConfig
from minillm.peft.method import refuse
from minillm.peft.names import Wrapper, collapse
from minillm.peft.record import arrange, follow, require_record
from minillm.peft.tune import taken, tune

WAYS = ("concat", "linear", "svd")
Factors = tuple[Tensor, Tensor]  # B (Dout, R) and A (R, Din) in float64; the update is B A


@dataclasses.dataclass(frozen=True)
class Combined:
    """What `combine` made: for each layer its rank, and the error |new - sum| / |sum| of its update (Frobenius norms).

    `error` is the same over all layers together.
    """

    name: str
    how: str
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float

    def __str__(self) -> str:
        head = f"{self.name!r} ({self.how}): relative error {self.error:.2g} over {len(self.ranks)} layers"
        groups: dict[tuple[int, str], list[str]] = {}
        for layer, rank in self.ranks.items():
            groups.setdefault((rank, f"{self.errors[layer]:.1g}"), []).append(layer)
        lines = [f"{', '.join(collapse(layers))}: rank {r}, error {error}" for (r, error), layers in groups.items()]
        return "\n  ".join([head, *lines])


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: Literal["concat", "linear", "svd"] = "concat",
    rank: int | None = None,
) -> Combined:
    """Add a LoRA adapter `name` whose update is the weighted sum of others', in each layer that any of them adapts.

    "concat": A and B side by side, which is the sum itself; ranks add up. Where they exceed what the layer's matrix can
    have, the sum is written at that greatest rank, still exact. "svd": the best approximation of rank `rank` (by
    default the largest of those combined; Eckart and Young 1936). "linear": the sum of the A times the sum of the
    B, each with the root of its weight (peft's formula), for adapters of equal rank; that product also has all B_i A_j
    of different adapters, so the error is large unless they are alike.

    The new scale is 1: alpha = rank, never rsLoRA. What is active stays so; `activate(model, name)` switches to it.
    Raises ValueError listing all that is wrong, with the model unchanged.

    Example: `print(combine(model, {"poems": 1.0, "code": -0.5}, "mix"))`
    """
    record = require_record(model, "combine")
    problems = [*taken(record, name), *_wrong(record.tunings, weights, how, rank)]
    layers: dict[str, dict[str, Wrapper]] = {}
    if isinstance(weights, Mapping):
        layers = lora_layers(record.tunings, [n for n in weights if n in record.tunings], problems)
    unequal = {layer: {n: w.rank for n, w in found.items()} for layer, found in layers.items()}
    unequal = {layer: ranks for layer, ranks in unequal.items() if len(set(ranks.values())) > 1}
    if how == "linear" and unequal:
        layer, ranks = next(iter(unequal.items()))
        problems.append(f'"linear" adds matrices of one shape, but in {layer} the ranks are {ranks}: use "concat"')
    refuse(problems, f"these adapters of this {type(model).__name__} cannot be combined; it is unchanged:")

    for other in weights:
        follow(model, record.tunings[other])
    exact = {layer: _terms(found, weights) for layer, found in layers.items()}
    made = {layer: WAY_OF[how](terms, rank) for layer, terms in exact.items()}
    active = record.active
    training = [n for n in active if record.tunings[n].trains]
    arrange(model, record, (), ())
    try:
        tune(model, _config(made), name)
        tuning = record.tunings[name]
        assert set(tuning.plan.adapted) == set(layers)
        for layer, wrapper in tuning.wrappers:
            for parameter, value in zip(_factors(wrapper), made[layer], strict=True):
                parameter.copy_(value)
    finally:
        arrange(model, record, active, training)
    return _report(name, how, {layer: _widened(wrapper) for layer, wrapper in tuning.wrappers}, exact)


def _wrong(tunings: Mapping, weights: Mapping[str, float], how: str, rank: int | None) -> list[str]:
    problems = []
    if not isinstance(weights, Mapping) or not weights:
        problems.append(f'weights: a number for each adapter, such as {{"a": 0.5, "b": -1.0}}, not {weights!r}')
    else:
        unknown = [n for n in weights if n not in tunings]
        problems += [f"there is no adapter {n!r}; did you mean {nearest(str(n), tunings)}?" for n in unknown]
        for n, weight in weights.items():
            if type(weight) not in (int, float) or not math.isfinite(weight) or weight == 0:
                problems.append(f"weights: {n!r}: a finite number, not 0, instead of {weight!r}")
    if how not in WAYS:
        problems.append(f"how={how!r}: one of {', '.join(WAYS)}")
    if rank is not None and how != "svd":
        problems.append(f'rank={rank!r} is for how="svd"; with {how!r} the ranks follow from the adapters')
    elif rank is not None and (type(rank) is not int or rank < 1):
        problems.append(f"rank={rank!r}: a whole number, at least 1")
    return problems


def _factors(wrapper: Wrapper) -> tuple[nn.Parameter, nn.Parameter]:
    """B and A of a LoRALinear or LoRAEmbedding, whose update is scale * B A (of an embedding's transposed matrix)."""
    a, b = (parameter for leaf, parameter in sorted(wrapper.named_parameters(recurse=False)))
    return b, a


def _widened(wrapper: Wrapper) -> Factors:
    b, a = _factors(wrapper)
    return wrapper.scale * b.double(), a.double()


def _terms(found: Mapping[str, Wrapper], weights: Mapping[str, float]) -> list[Factors]:
    """For each adapter of a layer the two factors of weight * scale * B A: the weight shared by both, its sign in A."""
    terms = []
    for name, wrapper in found.items():
        b, a = _factors(wrapper)
        share = math.sqrt(abs(weights[name] * wrapper.scale))
        terms.append((share * b.double(), math.copysign(share, weights[name]) * a.double()))
    return terms


def _side_by_side(terms: list[Factors]) -> Factors:
    return torch.cat([b for b, _ in terms], dim=1), torch.cat([a for _, a in terms], dim=0)


def _concat(terms: list[Factors], rank: int | None = None) -> Factors:
    b, a = _side_by_side(terms)
    limit = min(len(b), a.shape[1])
    return (b, a) if len(a) <= limit else _svd(terms, limit)


def _linear(terms: list[Factors], rank: int | None = None) -> Factors:
    return sum(b for b, _ in terms), sum(a for _, a in terms)


def _svd(terms: list[Factors], rank: int | None = None) -> Factors:
    """The product of thin matrices is small between their orthogonal parts: B A = Qb (Rb Ra^T) Qa^T."""
    rank = max(len(a) for _, a in terms) if rank is None else rank
    b, a = _side_by_side(terms)
    (left, small_b), (right, small_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(small_b @ small_a.mT, full_matrices=False)
    root = s[:rank].sqrt()  # half of each singular value on either side
    return left @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ right.mT


WAY_OF = {"concat": _concat, "linear": _linear, "svd": _svd}


def _config(made: Mapping[str, Factors]) -> LoraConfig:
    """Full paths as targets and as keys of the patterns, so that the file says exactly what is here.

    A key is also the end of longer paths, so those come first.
    """
    ranks = {layer: len(a) for layer, (_, a) in made.items()}
    most = max(ranks.values())
    pattern = [(layer, ranks[layer]) for layer in sorted(ranks, key=len, reverse=True)]
    pattern = pattern if min(ranks.values()) < most else []
    alphas = tuple((layer, float(rank)) for layer, rank in pattern)
    return LoraConfig(most, float(most), targets=tuple(ranks), rank_pattern=tuple(pattern), alpha_pattern=alphas)


def _report(name: str, how: str, made: Mapping[str, Factors], exact: Mapping[str, list[Factors]]) -> Combined:
    """Compare the new adapter, as rounded to its dtype, with the sum."""
    wrong, whole = {}, {}
    for layer, (b, a) in made.items():
        wrong[layer] = _norm(*_side_by_side([*exact[layer], (-b, a)]))
        whole[layer] = _norm(*_side_by_side(exact[layer]))
    errors = {layer: _ratio(wrong[layer], whole[layer]) for layer in made}
    total = _ratio(math.hypot(*wrong.values()), math.hypot(*whole.values()))
    return Combined(name, how, {layer: len(a) for layer, (_, a) in made.items()}, errors, total)


def _norm(b: Tensor, a: Tensor) -> float:
    """The Frobenius norm of b @ a, without making that large matrix."""
    return torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT).item()


def _ratio(wrong: float, whole: float) -> float:
    return wrong / whole if whole else math.inf if wrong else 0.0
