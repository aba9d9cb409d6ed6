"""Prefix tuning: every layer's attention sees P learned keys and values before those of the text.

Source: Li & Liang 2021 (arXiv:2101.00190).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import nearest
from minillm.peft.doors import enter
from minillm.peft.linears import adapter_dtype, device_of
from minillm.peft.method import AdapterConfig, Plan, refuse
from minillm.peft.names import base_modules, find, join, names_of, ties_across
from minillm.peft.peft_tasks import saved_modules
from minillm.peft.prefix_attention import PrefixAttention, PrefixGate, PrefixNetwork, PrefixPositions
from minillm.peft.prefix_files import PEFT_KEY, describe, join_layers, peft_parts, split_layers
from minillm.peft.prefix_sites import Site, computed, sites_of
from minillm.peft.record import Tuning
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import parameters_in

PARTS = ("decoder", "encoder", "cross")
RELATIVE = "relative_positions"

Make = Callable[[str, nn.Module], PrefixAttention | PrefixPositions]


@dataclasses.dataclass(frozen=True)
class PrefixPlan(Plan):
    """A plan that knows for peft's files what model it is for."""

    peft: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """`length` learned keys and values in each attention: P 2 G K values for each, which have no norm and no rotation.

    The text begins at position P, as behind P tokens of its own: in the paper's GPT-2 and in peft, whose files for the
    self-attention of one stack are read and written. (The paper's BART leaves the text where it was.)
    `parts` of an encoder-decoder that get a prefix: "decoder" and "encoder" self-attention, "cross" attention; all
    unless given, as in the paper, while peft has "decoder" alone.
    `projection_size` above 0: the prefix is computed by a network with so many inner features, 512 in the paper, of
    which each part has its own. It is saved, so training can go on; `flatten` keeps only what it computes.
    `gated`: the start changes nothing (see PrefixAttention); a prefix of zeros would, since softmax gives every key
    some weight. The text then stays where it was.
    `init_tokens`: start from what the model computes for these `length` tokens instead of from small random numbers.
    A decoder then reads the text exactly as behind these tokens, if it has no sliding window, which a prefix is never
    outside of. The authors found real words better than random numbers where examples are few.
    `dropout` acts on the prefix.
    """

    name = "prefix"
    peft_type = "PREFIX_TUNING"
    title = "Prefix tuning"
    paper = "Li & Liang 2021, arXiv:2101.00190"
    formula = "P 2 L G K; with projection d = G K and M: P d + d M + M + 2 L d (M + 1)"
    cannot_merge = "a prefix is more to read, not a change of weights: keep it as an adapter"
    start = "softmax gives part of its weight to the prefix from the first step on (gated=True starts as the base)"

    length: int = 10
    projection_size: int = 0
    gated: bool = False
    dropout: float = 0.0
    init_tokens: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name, least in (("length", 1), ("projection_size", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                problems.append(f"{name}: a whole number, at least {least}, not {value!r}")
        if type(self.gated) is not bool:
            problems.append(f"gated: True or False, not {self.gated!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        object.__setattr__(self, "parts", names_of("parts", self.parts, problems))
        problems += [f"parts: {p!r}; did you mean {nearest(p, PARTS)}?" for p in self.parts or () if p not in PARTS]
        ids = tuple(self.init_tokens) if isinstance(self.init_tokens, list | tuple) else None
        if ids is None or any(type(i) is not int or i < 0 for i in ids):
            problems.append(f"init_tokens: a tuple of token ids, not {self.init_tokens!r}")
        elif ids and len(ids) != self.length:
            problems.append(f"init_tokens: {len(ids)} of them for length={self.length}; the same number is needed")
        object.__setattr__(self, "init_tokens", ids)
        if self.gated is True:
            object.__setattr__(self, "start", "")
        return problems

    @property
    def positions(self) -> int:
        return 0 if self.gated else self.length

    def plan(self, model: nn.Module) -> PrefixPlan:
        problems: list[str] = []
        roots = find((name for name, _, _ in base_modules(model)), self.trainable, problems, "module (in trainable)")
        problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
        sites = self._sites(model, problems)
        refuse(problems, f"prefix tuning does not fit this {type(model).__name__}, which is unchanged:")
        make, networks = self._maker(sites, device="meta")
        modules = {site.name: make(site.name, nn.Identity()) for site in sites}
        modules |= {f"{join(stack, PrefixGate.leaf)}.{kind}": network for (stack, kind), network in networks.items()}
        parameters = {f"{name}.{leaf}": p.detach() for name, m in modules.items() for leaf, p in m.named_parameters()}
        parameters |= {name: torch.empty_like(p, device="meta") for name, p in parameters_in(model, roots).items()}
        relative = [join(stack, RELATIVE) for stack in self._moved(sites) if sites[0].config.positions == "relative"]
        adapted = (*(site.name for site in sites), *relative)
        described = describe(model, sites, plain=not (self.gated or self.projection_size))
        return PrefixPlan(adapted, tuple(roots), parameters, described, sites[0].config.kind)

    def install(self, model: nn.Module, plan: PrefixPlan) -> None:
        sites = self._sites(model, [])
        start = computed(model, [site.name for site in sites], self.init_tokens) if self.init_tokens else {}
        make, networks = self._maker(sites)
        wrappers = dict(wrap_modules(model, plan.adapted, make))
        for name, flat in start.items():
            wrappers[name].set_flat(flat)
        moved = self._moved(sites)
        for stack in dict.fromkeys([*moved, *(stack for stack, _ in networks)]):
            own = {kind: network for (other, kind), network in networks.items() if other == stack}
            relative = [wrapper for name, wrapper in wrappers.items() if name == join(stack, RELATIVE)]
            length = self.length if stack in moved else 0
            enter(model, stack, PrefixGate(length, sites[0].config.max_positions, own, relative))

    def _maker(self, sites: list[Site], device: str | None = None) -> tuple[Make, dict[tuple[str, str], PrefixNetwork]]:
        """What makes the wrapper at a name, and the networks that it has made so far, by stack and kind."""
        named, networks = {site.name: site for site in sites}, {}

        def make(name: str, base: nn.Module) -> PrefixAttention | PrefixPositions:
            if name not in named:
                return PrefixPositions(base, self.length)
            site, inner = named[name], self.projection_size
            config, key = site.config, (site.stack, site.kind)
            like = {"dtype": adapter_dtype(site.attention), "device": device or device_of(site.attention)}
            if inner and key not in networks:
                networks[key] = PrefixNetwork(self.length, site.num_features, inner, **like)
            like |= {"network": networks.get(key), "dropout": self.dropout, "cross": site.part == "cross"}
            heads = config.num_heads if self.gated else 0
            return PrefixAttention(base, self.length, config.num_kv_heads, config.head_dim, gated_heads=heads, **like)

        return make, networks

    def _sites(self, model: nn.Module, problems: list[str]) -> list[Site]:
        """The attentions that get a prefix."""
        if not (sites := sites_of(model)):
            problems.append(
                "a prefix enters by the attention of minillm's own layers, and there is none (load a checkpoint of "
                "transformers with minillm.load)"
            )
            return []
        config, there = sites[0].config, sorted({site.part for site in sites})
        problems += [f"parts: it has no {p!r}, only {', '.join(there)}" for p in self.parts if p not in there]
        if not self.gated and self.length >= config.max_positions:
            most = f"max_positions={config.max_positions}"
            problems.append(f"length={self.length} leaves no position for a text: the model has {most}")
        if bad := sorted({i for i in self.init_tokens if i >= config.vocab_size}):
            problems.append(f"init_tokens {bad} are outside the vocabulary 0..{config.vocab_size - 1}")
        return [site for site in sites if site.part in (self.parts or there)]

    def _moved(self, sites: list[Site]) -> list[str]:
        """The stacks whose text begins behind the prefix."""
        stacks = dict.fromkeys(site.stack for site in sites if site.kind == "self_attn")
        return [] if self.gated else list(stacks)

    def to_peft(self, plan: PrefixPlan) -> dict[str, Any]:
        return {"num_virtual_tokens": self.length, "modules_to_save": list(plan.whole) or None, **plan.peft}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "PrefixConfig":
        """A network is gone from peft's files, also where they say that there was one."""
        length = fields.get("num_virtual_tokens")
        return cls(length=length, parts=peft_parts(fields, model), trainable=saved_modules(fields, model))

    def to_peft_tensors(self, plan: PrefixPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "token_dim" not in plan.peft:
            return super().to_peft_tensors(plan, tensors)
        return join_layers(_prefixes(plan), plan.kind, plan.peft["num_layers"], tensors)

    def from_peft_tensors(self, plan: PrefixPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if PEFT_KEY not in tensors:
            return super().from_peft_tensors(plan, tensors)
        return split_layers(names := _prefixes(plan), plan.kind, plan.parameters[names[0]].shape[1], tensors)

    def flatten(self, model: nn.Module, tuning: Tuning) -> None:
        if not self.projection_size:
            super().flatten(model, tuning)
        for _, wrapper in tuning.wrappers:
            if isinstance(wrapper, PrefixAttention):
                prefix = wrapper.flat()
                wrapper.network, wrapper.prefix = (None,), None
                wrapper.prefix = nn.Parameter(prefix)
        for _, gate in tuning.gates:
            gate.drop_networks()
        tuning.config = dataclasses.replace(self, projection_size=0)
        tuning.plan = tuning.config.plan(model)


def _prefixes(plan: Plan) -> list[str]:
    """The names of the layers' prefixes, first layer first."""
    return [f"{name}.prefix" for name in plan.adapted if not name.endswith(RELATIVE)]
