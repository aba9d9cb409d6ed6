"""The sizes and choices that define a model; everything else follows from them."""

import math
from dataclasses import dataclass
from typing import Literal

from minillm.config import nearest
from minillm.layers import MLPS, NORMS
from minillm.ops import ACTIVATIONS, RopeScaling

KINDS = ("decoder", "encoder", "encoder_decoder")
POSITIONS = ("rope", "learned", "sinusoidal", "relative")


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape. The defaults are Llama's choices (Touvron et al. 2023, arXiv:2302.13971) at a teaching size.

    Every family of the course is a point in this space: `models/families` names the choices of each.

    `None` means "follows from the others": `num_kv_heads` = num_heads, `head_dim` = hidden_size / num_heads,
    `intermediate_size` = 4 hidden_size for a plain MLP and 8/3 of it, rounded up to a multiple of 8, for a gated one,
    which has three matrices instead of two (Shazeer 2020, arXiv:2002.05202), `attention_dropout` = dropout,
    `num_decoder_layers` = num_layers, and embeddings are scaled where sinusoidal positions are added to them.
    """

    kind: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 1024  # the longest sequence, cached tokens included
    # how a model knows the order of its tokens
    positions: Literal["rope", "learned", "sinusoidal", "relative"] = "rope"
    rope_theta: float = 10000.0  # base of the rotation's wavelengths
    rope_scaling: RopeScaling | None = None  # how a longer context was reached than the first training's
    relative_buckets: int = 32  # T5: distances share this many learned biases ...
    relative_distance: int = 128  # ... and from here on one
    sliding_window: int | tuple[int, ...] | None = None  # keys a query sees, of all layers or of each; 0 sees all
    # the blocks
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_first: bool = True  # x + f(norm(x)), else norm(x + f(x)) and no final norm
    mlp: Literal["gated", "plain"] = "gated"
    activation: str = "silu"
    attention_bias: bool | Literal["qkv"] = False  # "qkv": on queries, keys and values only
    mlp_bias: bool = False
    qk_norm: bool = False  # each head's queries and keys pass a norm before they meet
    # embeddings and head
    embed_norm: bool = False  # a norm on the sum of the embeddings
    scale_embeddings: bool | None = None  # by sqrt(hidden_size)
    token_types: int = 0  # encoders: kinds of segments, each with its own vector
    tie_embeddings: bool = True  # the LM head is the embedding matrix (Press & Wolf 2017, arXiv:1608.05859)
    logit_scale: float = 1.0  # on what the LM head reads
    # encoder-decoders
    num_decoder_layers: int | None = None
    decoder_start_id: int = 0  # the decoder's first input
    # training
    dropout: float = 0.0  # on embeddings and both sublayers' outputs
    attention_dropout: float | None = None  # on attention weights
    init_std: float = 0.02

    def __post_init__(self):
        wrong = [f"{name}={getattr(self, name)}: must be at least 1" for name in _SIZES if not _is_size(self, name)]
        for name, choices in _CHOICES:
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}: did you mean {nearest(str(value), choices)}?")
        for name in ("dropout", "attention_dropout"):
            if (value := getattr(self, name)) is not None and not 0.0 <= value < 1.0:
                wrong.append(f"{name}={value}: must be in [0, 1)")
        for name in ("rope_theta", "norm_eps", "logit_scale"):
            if not 0.0 < getattr(self, name) < math.inf:
                wrong.append(f"{name}={getattr(self, name)}: must be a number above 0")
        if not 0.0 <= self.init_std < math.inf:
            wrong.append(f"init_std={self.init_std}: must be a number, at least 0")
        if self.token_types < 0:
            wrong.append(f"token_types={self.token_types}: must be at least 0")
        if not wrong:
            if self.head_dim is None and self.hidden_size % self.num_heads:
                wrong.append(
                    f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}; or give head_dim"
                )
            self._fill_in()
            wrong += self._conflicts()
        if wrong:
            raise ValueError("this model cannot be built:\n  " + "\n  ".join(wrong))

    def _fill_in(self) -> None:
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "intermediate_size": 4 * self.hidden_size if self.mlp == "plain" else -(-self.hidden_size // 3) * 8,
            "scale_embeddings": self.positions == "sinusoidal",
            "attention_dropout": self.dropout,
        }
        if self.kind == "encoder_decoder":
            derived["num_decoder_layers"] = self.num_layers
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the one way to finish a frozen dataclass

    def _conflicts(self) -> list[str]:
        wrong = []
        if self.num_heads % self.num_kv_heads:
            wrong.append(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            wrong.append(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of features")
        if self.rope_scaling is not None and self.positions != "rope":
            wrong.append(f"rope_scaling is for positions='rope', not {self.positions!r}")
        if self.positions == "relative":
            least = 2 if self.kind == "decoder" else 4  # half of the buckets are near ones, on each side that is seen
            if self.relative_buckets < least or self.relative_distance <= self.relative_buckets // 2:
                wrong.append(
                    f"relative_buckets={self.relative_buckets} must be at least {least} and relative_distance="
                    f"{self.relative_distance} more than half of it: near distances have a bucket each"
                )
        windows = self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window or 0,)
        if any(window < 0 for window in windows):
            wrong.append(f"sliding_window={self.sliding_window}: must be at least 1, or 0 for a layer that sees all")
        if isinstance(self.sliding_window, tuple) and len(windows) != self.num_layers:
            wrong.append(f"sliding_window has {len(windows)} entries for num_layers={self.num_layers}")
        if self.kind != "decoder" and any(windows):
            wrong.append(f"sliding_window is for decoders, not kind={self.kind!r}")
        if self.kind != "encoder" and self.token_types:
            wrong.append(f"token_types is for encoders, not kind={self.kind!r}")
        if self.kind != "encoder_decoder" and self.num_decoder_layers is not None:
            wrong.append(f"num_decoder_layers is for encoder-decoders, not kind={self.kind!r}: give num_layers")
        if not 0 <= self.decoder_start_id < self.vocab_size:
            wrong.append(f"decoder_start_id={self.decoder_start_id} is outside the vocabulary 0..{self.vocab_size - 1}")
        return wrong

    def window(self, layer: int) -> int:
        """How many keys, its own position included, a query of this layer sees; 0 means all."""
        return self.sliding_window[layer] if isinstance(self.sliding_window, tuple) else self.sliding_window or 0


_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions", "relative_buckets")
_SIZES += ("num_kv_heads", "head_dim", "intermediate_size", "num_decoder_layers", "relative_distance")
_CHOICES = (
    ("kind", KINDS),
    ("positions", POSITIONS),
    ("norm", NORMS),
    ("mlp", MLPS),
    ("activation", ACTIVATIONS),
    ("attention_bias", (True, False, "qkv")),
)


def _is_size(config: ModelConfig, name: str) -> bool:
    value = getattr(config, name)
    return value is None or value >= 1
