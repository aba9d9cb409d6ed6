"""LoRA as a method: which layers of a model get an adapter, and how Hugging Face peft would say it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillm.peft import patterns
from minillm.peft.linears import adapter_dtype, features, is_linear
from minillm.peft.lora_bias import BIASES, LoraPlan, if_any, our_names, peft_name, with_biases, without_repeats
from minillm.peft.lora_embedding import LoRAEmbedding
from minillm.peft.lora_linear import LoRALinear, rank_problem
from minillm.peft.method import PREFIX, AdapterConfig, Plan, refuse
from minillm.peft.names import base_modules, names_of, original_modules
from minillm.peft.replace import wrap_modules
from minillm.peft.targets import ALL_LINEAR, find_targets, without_doubles

PEFT_BOOKKEEPING = (  # fields of adapter_config.json that change no number by themselves
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
)

LINEAR_LEAVES = ("lora_A", "lora_B")
EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Which linear layers and embeddings get a LoRA, and of what size.

    A target is the end of a module's path, whole segments ("q_proj", "mlp.up_proj"), or "all-linear": every linear
    layer but the output head. Trainable values: R * (Din + Dout), summed over the layers; an embedding has Din = V.
    `rank_pattern` and `alpha_pattern` give some targets a value of their own: (("v_proj", 4),) or {"v_proj": 4}, on the
    command line lora.rank_pattern=v_proj:4,k_proj:2. A target's whole path goes before ends of it.
    `bias` trains biases of the base beside the adapters, of which each adapter has its own copy: "lora_only" those of
    the adapted layers, Dout values each, "all" every bias of the model. A model that has none is refused.
    `trainable` names modules that train in full beside the adapters and are saved with them, such as a new head.
    """

    name = "lora"
    peft_type = "LORA"
    title = "Low-rank adapters"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    formula = "R (Din + Dout) for each layer"

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # q_proj:4,v_proj:8
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # q_proj:8,v_proj:16
    bias: Literal["none", "all", "lora_only"] = "none"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        object.__setattr__(self, "targets", names_of("targets", self.targets, problems))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, patterns.pairs_of(name, getattr(self, name), problems))
        for name, value in (("rank", self.rank), *self.rank_pattern):
            if type(value) is not int or value < 1:
                problems.append(f"{name}: a rank is a whole number, at least 1, not {value!r}")
        for name, value in (("alpha", self.alpha), *self.alpha_pattern):
            if type(value) not in (int, float) or not 0 < value < math.inf:
                problems.append(f"{name}: an alpha is a number above 0, not {value!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        if type(self.rslora) is not bool:
            problems.append(f"rslora: True or False, not {self.rslora!r}")
        if self.bias not in BIASES:
            problems.append(f"bias: one of {', '.join(BIASES)}, not {self.bias!r}")
        if self.targets == ():
            problems.append(f'targets: name at least one, such as "q_proj", or "{ALL_LINEAR}"')
        return problems

    def plan(self, model: nn.Module) -> LoraPlan:
        keys = {name: [key for key, _ in getattr(self, name)] for name in ("rank_pattern", "alpha_pattern")}
        found = find_targets(
            model,
            self.targets,
            self.trainable,
            method="LoRA",
            kind=lambda module: is_linear(module) or is_embedding(module),
            kind_name="linear or embedding layer",
            fits=lambda name, layer: self._ambiguous(name) or rank_problem(self._rank(name), *_sizes(layer)),
            among=keys,
        )
        parameters = {}
        for name, layer in found.layers.items():
            (size_in, size_out), rank = _sizes(layer), self._rank(name)
            like = {"dtype": adapter_dtype(layer), "device": "meta"}
            leaf_a, leaf_b = EMBEDDING_LEAVES if is_embedding(layer) else LINEAR_LEAVES
            parameters[f"{name}.{leaf_a}"] = torch.empty(rank, size_in, **like)
            parameters[f"{name}.{leaf_b}"] = torch.empty(size_out, rank, **like)
        return with_biases(found.plan(parameters), model, self.bias)

    def install(self, model: nn.Module, plan: Plan) -> None:
        layers = {name: layer for name, _, layer in base_modules(model)}

        def make(name: str, base: nn.Module) -> LoRALinear | LoRAEmbedding:
            rank, alpha = self._rank(name), patterns.value_of(self.alpha_pattern, name, self.alpha)
            if is_embedding(layers[name]):
                return LoRAEmbedding(base, rank, alpha, rslora=self.rslora)
            return LoRALinear(base, rank, alpha, dropout=self.dropout, rslora=self.rslora)

        wrap_modules(model, plan.adapted, make)

    def _rank(self, name: str) -> int:
        return patterns.value_of(self.rank_pattern, name, self.rank)

    def _ambiguous(self, name: str) -> str | None:
        """Why the patterns do not say one rank and one alpha, if so."""
        whys = {field: patterns.ambiguous(getattr(self, field), name) for field in ("rank_pattern", "alpha_pattern")}
        return "; ".join(f"{field}: {why}" for field, why in whys.items() if why) or None

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        targets = plan.adapted if ALL_LINEAR in self.targets else self.targets  # peft knows other heads than we do
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,  # servers expect an int
            "target_modules": list(targets),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": patterns.to_peft(self.rank_pattern),
            "alpha_pattern": patterns.to_peft(self.alpha_pattern),
            "modules_to_save": list(plan.whole) or None,  # peft looks at the end of the text, not of the path
            "bias": self.bias,
            "fan_in_fan_out": False,  # peft sees a Conv1D by itself
            "init_lora_weights": True,
            "use_dora": False,
        }

    def to_peft_tensors(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """peft's adapters are linear layers with a weight each, but in embeddings."""
        return {PREFIX + peft_name(name, plan) + _weight(name): tensor for name, tensor in tensors.items()}

    def from_peft_tensors(self, plan: LoraPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {key.removeprefix(PREFIX): tensor for key, tensor in without_repeats(tensors).items()}
        short = {name: name.removesuffix(".weight") for name in names}
        return our_names(plan, {short[n] if _weight(short[n]) else n: tensor for n, tensor in names.items()})

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "LoraConfig":
        rest = {name: value for name, value in fields.items() if name not in PEFT_BOOKKEEPING}
        targets, saved = rest.pop("target_modules", None) or (), rest.pop("modules_to_save", None) or ()
        names = dict.fromkeys(name for name, _, _ in original_modules(model))
        ends = {end: [name for name in names if name.endswith(end)] for end in saved}  # "norm" is "attn_norm" too
        # peft writes "classifier" and "score" for every classifier, whichever of them there is
        if isinstance(targets, str) and targets != ALL_LINEAR:  # peft reads a text as a regular expression
            names = dict.fromkeys(name for name, _, module in original_modules(model) if is_linear(module))
            targets = [name for name in names if re.fullmatch(targets, name)]
        targets = (targets,) if isinstance(targets, str) else tuple(without_doubles(targets))
        ranks, alphas = (patterns.from_peft(rest.pop(f"{x}_pattern", None), names, targets) for x in ("rank", "alpha"))
        config = {
            "rank": rest.pop("r", 8),
            "alpha": float(rest.pop("lora_alpha", 8)),
            "targets": targets,
            "dropout": float(rest.pop("lora_dropout", 0.0)),
            "rslora": bool(rest.pop("use_rslora", False)),
            "rank_pattern": ranks,
            "alpha_pattern": {key: float(alpha) for key, alpha in alphas.items()},
            "bias": rest.pop("bias", None) or "none",
            "trainable": tuple(name for end in saved for name in ends[end] or ([] if any(ends.values()) else [end])),
        }
        if rest.get("init_lora_weights") in (True, False, "gaussian"):  # the others change the base as well
            rest.pop("init_lora_weights")
        unknown = [f"{name} = {value!r}" for name, value in rest.items() if value]
        refuse(unknown, "the adapter needs what this LoRA cannot do:")
        return if_any(cls(**config), model)


def is_embedding(module: nn.Module) -> bool:
    """Whether it is torch's embedding."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(Din, Dout), as of a linear layer that reads one-hot vectors."""
    return (layer.num_embeddings, layer.embedding_dim) if is_embedding(layer) else features(layer)


def _weight(name: str) -> str:
    return ".weight" if name.rpartition(".")[2] in LINEAR_LEAVES else ""
