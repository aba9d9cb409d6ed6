"""Prompt tuning: P trained vectors stand before the text, and nothing of the model itself changes.

Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillm.config import nearest
from minillm.peft.doors import enter, entrances
from minillm.peft.linears import device_of
from minillm.peft.method import PREFIX, AdapterConfig, Plan, refuse
from minillm.peft.names import base_modules, find, join, ties_across
from minillm.peft.peft_tasks import POOLED, described, refuse_task, saved_modules
from minillm.peft.prompt_gate import PromptGate, embedding, entry
from minillm.peft.targets import parameters_in

INITS = ("vocab", "text", "random")


@dataclasses.dataclass(frozen=True)
class PromptPlan(Plan):
    """A plan that knows for peft's files what kind of model it is for."""

    peft: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SoftPrompt(AdapterConfig):
    """What the methods that put `length` trained vectors before the text share."""

    cannot_merge = "a prompt is more to read, not a change of weights: keep it as an adapter"
    start = "the text is read behind a prompt from the first step on, and no prompt reads like none"

    length: int = 20

    @property
    def positions(self) -> int:
        return self.length

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if type(self.length) is not int or self.length < 1:
            problems.append(f"length: a number of vectors, at least 1, not {self.length!r}")
        return problems

    def gate(self, body: nn.Module, device: torch.device | str) -> PromptGate:
        """The module that holds the prompt, its values not yet set."""
        raise NotImplementedError

    def begin(self, gate: PromptGate, body: nn.Module) -> None:
        """Set the values that training starts from."""
        raise NotImplementedError

    def plan(self, model: nn.Module) -> PromptPlan:
        problems: list[str] = []
        roots = find((name for name, _, _ in base_modules(model)), self.trainable, problems, "module (in trainable)")
        problems += [f"{name}: {problem}" for name, problem in ties_across(model, roots).items()]
        name, body = next(iter(entrances(model)), ("", model))
        if not entry(body):
            problems.append(
                "a prompt enters as embeddings, and it takes none: it must be a Decoder, Encoder, EncoderDecoder or "
                "RecurrentLM of minillm, or a head on one (minillm.load reads checkpoints of transformers)"
            )
        else:
            problems += self._misfits(body)
        refuse(problems, f"{self.title} does not fit this {type(model).__name__}, which is unchanged:")
        path = join(name, PromptGate.leaf)
        parameters = {join(path, leaf): p.detach() for leaf, p in self.gate(body, "meta").named_parameters()}
        parameters |= {name: torch.empty_like(p, device="meta") for name, p in parameters_in(model, roots).items()}
        return PromptPlan((path,), tuple(roots), parameters, _describe(model, body))

    def _misfits(self, body: nn.Module) -> list[str]:
        limit = body.config.max_positions
        if self.length < limit:
            return []
        return [f"length={self.length} leaves no position for a text: the model has max_positions={limit}"]

    def install(self, model: nn.Module, plan: Plan) -> None:
        ((name, body),) = entrances(model)
        gate = self.gate(body, device_of(embedding(body))).train(body.training)
        self.begin(gate, body)
        enter(model, name, gate)


@dataclasses.dataclass(frozen=True)
class PromptConfig(SoftPrompt):
    """`length` vectors that train, P D values.

    They start as the embeddings of random tokens ("vocab"), of `init_tokens` repeated or cut to the length ("text"), or
    as random numbers as large as embeddings are ("random"); numbers around 1, as in some libraries, drown the text.
    """

    name = "prompt"
    peft_type = "PROMPT_TUNING"
    title = "Prompt tuning"
    paper = "Lester et al. 2021, arXiv:2104.08691"
    formula = "P D"

    init: Literal["vocab", "text", "random"] = "vocab"
    init_tokens: tuple[int, ...] = ()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.init not in INITS:
            problems.append(f"init={self.init!r}: did you mean {nearest(str(self.init), INITS)}?")
        ids = tuple(self.init_tokens) if isinstance(self.init_tokens, list | tuple) else None
        if ids is None or any(type(i) is not int or i < 0 for i in ids):
            problems.append(f"init_tokens: a tuple of token ids, not {self.init_tokens!r}")
        elif (self.init == "text") != bool(ids):
            problems.append(f'init={self.init!r} with {len(ids)} init_tokens: "text" needs some, the others use none')
        object.__setattr__(self, "init_tokens", ids)
        return problems

    def _misfits(self, body: nn.Module) -> list[str]:
        size = embedding(body).num_embeddings
        bad = sorted({i for i in self.init_tokens if i >= size})
        return super()._misfits(body) + ([f"init_tokens {bad} are outside the vocabulary 0..{size - 1}"] if bad else [])

    def gate(self, body: nn.Module, device: torch.device | str) -> PromptGate:
        return PromptGate(body, self.length, device)

    @torch.no_grad()
    def begin(self, gate: PromptGate, body: nn.Module) -> None:
        if self.init == "random":
            gate.embeddings.normal_(std=embedding_std(body) * gate.scale)
            return
        ids = torch.randint(embedding(body).num_embeddings, (self.length,))
        if self.init == "text":
            ids = torch.tensor((self.init_tokens * self.length)[: self.length])
        gate.embeddings.copy_(body.embed_tokens(ids.to(gate.embeddings.device)) * gate.scale)

    def to_peft(self, plan: PromptPlan) -> dict[str, Any]:
        return {**plan.peft, "num_virtual_tokens": self.length, "modules_to_save": list(plan.whole) or None}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> "PromptConfig":
        return config_from_peft(fields, model)

    def to_peft_tensors(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_key(name, plan): tensor for name, tensor in tensors.items()}

    def from_peft_tensors(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """peft's prompt for an encoder-decoder has a second half, which never trained and is never read."""
        names = {_key(name, plan): name for name in plan.parameters}
        named = {names.get(key, key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
        prompt = named.get(plan.adapted[0] + ".embeddings")
        if prompt is not None and plan.peft.get("task_type") == "SEQ_2_SEQ_LM" and len(prompt) == 2 * self.length:
            named[plan.adapted[0] + ".embeddings"] = prompt[: self.length].clone()
        return named


def config_from_peft(fields: Mapping[str, Any], model: nn.Module) -> PromptConfig:
    """What peft's prompt tuning and P-tuning leave behind: the vectors alone."""
    refuse_task(fields, model, "".join(_reason(model, body) for _, body in entrances(model)))
    return PromptConfig(length=fields.get("num_virtual_tokens"), trainable=saved_modules(fields, model))


@torch.no_grad()
def embedding_std(body: nn.Module, most: int = 4096) -> float:
    """The standard deviation of the embeddings' numbers, of at most so many tokens drawn at random."""
    table = embedding(body)
    ids = torch.randperm(table.num_embeddings)[:most].to(device_of(table))
    return body.embed_tokens(ids).float().std().item()


def _key(name: str, plan: Plan) -> str:
    """peft's: a prompt's is always the same, and a head beside it stands one level higher than with other methods."""
    return "prompt_embeddings" if name == plan.adapted[0] + ".embeddings" else f"base_model.{name}"


def _describe(model: nn.Module, body: nn.Module) -> dict[str, Any]:
    """The fields of adapter_config.json that describe the model."""
    fields = described(model, PromptConfig.peft_type, _reason(model, body))
    if "task_type" not in fields:
        return fields
    return fields | {
        "token_dim": body.config.hidden_size,
        "num_layers": body.config.num_layers,
        "num_attention_heads": body.config.num_heads,
        "num_transformer_submodules": 1,  # the source of an encoder-decoder; with peft's 2 the second half never trains
    }


def _reason(model: nn.Module, body: nn.Module) -> str:
    """Why peft computes something else with a prompt, if it does."""
    head, kind = getattr(model, "head_config", None), getattr(body.config, "kind", None)
    if head is None:
        return ""
    if kind == "encoder_decoder":
        return "transformers' heads on encoder-decoders take no embeddings, by which a prompt enters"
    if head.task == "span":
        return (
            "peft counts the places of an answer from its first virtual token on, in training too: they would be off "
            "by the prompt's length"
        )
    if head.task in POOLED and (kind, head.pool) != ("decoder", "last"):
        return (
            "peft reads the state of its first virtual token in place of the text's first one, [CLS], so prompt and "
            "head mean something else there"
        )
    return ""
