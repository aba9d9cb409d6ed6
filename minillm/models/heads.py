"""What reads a body's hidden states: one small module for each kind of task.

A body is an Encoder, a Decoder without its LM head, or an EncoderDecoder without it. Every head keeps it as `body`,
and takes what the body's `hidden` takes. Losses are elsewhere (`training/losses`): a head returns scores.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.config import nearest
from minillm.layers import NORMS
from minillm.models.build import Model, build_body
from minillm.models.config import ModelConfig
from minillm.models.pooling import DENSE, POOLS, Pooler
from minillm.ops import ACTIVATIONS


@dataclass(frozen=True)
class HeadConfig:
    """What a model answers, and how it reads the body.

    `num_labels`: classes, labels, or numbers to predict. `pool`: the hidden state that stands for the text: of its
    first token (BERT's [CLS]), its last (decoders, which have read all only there), or the mean of its real tokens.
    `dense`: the activation of a D x D layer between that state and the answer, or None for no such layer.
    """

    task: Literal[
        "masked_lm", "classification", "multi_label", "regression", "tagging", "span", "choice", "embedding"
    ] = "classification"
    num_labels: int = 2
    pool: Literal["first", "last", "mean"] = "first"
    dense: str | None = "tanh"
    bias: bool = True  # of the layer that makes the answer
    dropout: float = 0.1  # before it

    def __post_init__(self):
        wrong = []
        for name, choices in (("task", HEADS), ("pool", POOLS), ("dense", (None, *DENSE))):
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}: did you mean {nearest(str(value), map(str, choices))}?")
        if self.num_labels < 1:
            wrong.append(f"num_labels={self.num_labels}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout}: must be in [0, 1)")
        if wrong:
            raise ValueError("this head cannot be built:\n  " + "\n  ".join(wrong))


class Head(nn.Module):
    """A body, and what all heads share with it."""

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__()
        self.body, self.head_config = body, config

    @property
    def config(self) -> ModelConfig:
        """The body's config."""
        return self.body.config

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The body's."""
        return self.body.tokenizer_fingerprint

    @tokenizer_fingerprint.setter
    def tokenizer_fingerprint(self, fingerprint: str | None) -> None:
        self.body.tokenizer_fingerprint = fingerprint

    @property
    def gradient_checkpointing(self) -> bool:
        """The body's."""
        return self.body.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.body.gradient_checkpointing = on

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The body's embedding matrix."""
        return self.body.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The body's blocks."""
        return self.body.layers

    def tie_weights(self) -> None:
        """Tie what the config ties, after parameters were replaced."""
        self.body.tie_weights()

    def _states(self, tokens: Tensor | None, mask: Tensor | None, options: dict) -> Tensor:
        """The body's hidden states (B, T, D) on a text.

        An encoder-decoder reads the text on both sides, the decoder's moved right by one (Lewis et al. 2019,
        arXiv:1910.13461, section 3.1).
        """
        if self.config.kind != "encoder_decoder":
            return self.body.hidden(tokens, mask=mask, **options)
        if tokens is None:
            raise ValueError("on an encoder-decoder a head reads tokens, on both sides: embeds cannot stand for them")
        moved, first = tokens.roll(1, dims=1), torch.ones_like(tokens, dtype=torch.bool)
        first[:, 1:] = False if mask is None else ~mask[:, :-1]  # what follows padding is a text's first token
        moved = moved.masked_fill(first, self.config.decoder_start_id)
        return self.body.hidden(tokens, moved, source_mask=mask, mask=mask, **options)

    def _pooled(self, tokens: Tensor | None, mask: Tensor | None, options: dict) -> Tensor:
        """What stands for the text (B, D). Of an encoder the last block computes only the state that is read."""
        text = options.get("embeds") if tokens is None else tokens
        if self.config.kind != "encoder" or self.pooler.pool == "mean" or text is None:
            return self.pooler(self._states(tokens, mask, options), mask)
        real = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        return self.pooler(self._states(tokens, mask, options | {"at": self.pooler.position(real)}))

    @torch.no_grad()
    def _reset(self, *layers: nn.Module | None) -> None:
        for layer in layers:
            if layer is not None:
                layer.weight.normal_(std=self.config.init_std)
                if layer.bias is not None:
                    layer.bias.zero_()


class MaskedLM(Head):
    """Which token stood here? A dense layer, a norm, and the embedding matrix read backwards, with a bias.

    Source: Devlin et al. 2018 (arXiv:1810.04805), section 3.1. `hidden` and `lm_head` are as in `Decoder`, so the
    losses of language models serve here too.
    """

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        c = body.config
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.activation = ACTIVATIONS[c.activation]
        self.norm = NORMS[c.norm](c.hidden_size, c.norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size)
        self._reset(self.dense, self.lm_head)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head read the embedding matrix itself, if the config says so."""
        super().tie_weights()
        if self.config.tie_embeddings:
            self.lm_head.weight = self.body.embed_tokens.weight

    def hidden(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B T D"]:
        """What the LM head reads."""
        return self.norm(self.activation(self.dense(self._states(tokens, mask, options))))

    def forward(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token at each position."""
        return self.lm_head(self.hidden(tokens, mask=mask, **options))


class Classifier(Head):
    """One answer for a text: classes, labels that may hold together, or numbers, by the loss it is trained with."""

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        self.pooler = _pooler(body.config, config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(body.config.hidden_size, config.num_labels, bias=config.bias)
        self._reset(self.pooler.dense, self.classifier)

    def forward(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B N"]:
        """A score for each of the N labels."""
        return self.classifier(self.dropout(self._pooled(tokens, mask, options)))


class Tagger(Head):
    """An answer for each token."""

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(body.config.hidden_size, config.num_labels, bias=config.bias)
        self._reset(self.classifier)

    def forward(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B T N"]:
        """A score for each of the N labels at each position."""
        return self.classifier(self.dropout(self._states(tokens, mask, options)))


class SpanExtractor(Head):
    """Extractive question answering: where in the text does the answer start and end?

    Source: Devlin et al. 2018 (arXiv:1810.04805), section 4.2.
    """

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        self.outputs = nn.Linear(body.config.hidden_size, 2)
        self._reset(self.outputs)

    def forward(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B T 2"]:
        """Scores of each position as the answer's first and as its last; padding is out of the question (-inf)."""
        scores = self.outputs(self._states(tokens, mask, options))
        return scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf)


class MultipleChoice(Head):
    """Which of C texts fits best? Each is read alone and gets one score (Radford et al. 2018, GPT, section 3.3)."""

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        self.pooler = _pooler(body.config, config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(body.config.hidden_size, 1, bias=config.bias)
        self._reset(self.pooler.dense, self.classifier)

    def forward(
        self, tokens: Int[Tensor, "B C T"], *, mask: Bool[Tensor, "B C T"] | None = None, **options
    ) -> Float[Tensor, "B C"]:
        """A score for each choice; `options` have the choices in their second dimension too."""
        flat = {name: value.flatten(0, 1) for name, value in options.items()}
        flat_mask = None if mask is None else mask.flatten(0, 1)
        pooled = self._pooled(tokens.flatten(0, 1), flat_mask, flat)
        return self.classifier(self.dropout(pooled)).unflatten(0, tokens.shape[:2]).squeeze(-1)


class SentenceEmbedder(Head):
    """One vector for a text (Reimers & Gurevych 2019, arXiv:1908.10084); BERT's pooler where `dense` is "tanh"."""

    def __init__(self, body: Model, config: HeadConfig):
        super().__init__(body, config)
        self.pooler = _pooler(body.config, config)
        self._reset(self.pooler.dense)

    def forward(
        self, tokens: Int[Tensor, "B T"] | None = None, *, mask: Bool[Tensor, "B T"] | None = None, **options
    ) -> Float[Tensor, "B D"]:
        """The text's vector; compare two by their cosine."""
        return self._pooled(tokens, mask, options)


def _pooler(config: ModelConfig, head: HeadConfig) -> Pooler:
    if config.kind == "decoder" and head.pool == "first":
        raise ValueError("pool='first': a decoder's first state has read only the first token; take 'last' or 'mean'")
    return Pooler(config.hidden_size, head.pool, head.dense)


HEADS = {
    "masked_lm": MaskedLM,
    "classification": Classifier,
    "multi_label": Classifier,
    "regression": Classifier,
    "tagging": Tagger,
    "span": SpanExtractor,
    "choice": MultipleChoice,
    "embedding": SentenceEmbedder,
}


def put_head(body: Model, head: HeadConfig) -> Head:
    """A new head with random weights on a body."""
    return HEADS[head.task](body, head)


def build_with_head(config: ModelConfig, head: HeadConfig) -> Head:
    """A new body with a new head on it, all weights random."""
    return put_head(build_body(config), head)
