"""The sizes and choices that define a model; everything else follows from them."""

import math
from dataclasses import dataclass
from typing import Literal

from minillm.config import nearest
from minillm.layers import MLPS, NORMS
from minillm.ops import ACTIVATIONS

POSITIONS = ("rope", "learned", "sinusoidal")


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape. The defaults are Llama's choices (Touvron et al. 2023, arXiv:2302.13971) at a teaching size.

    `None` means "follows from the others": `num_kv_heads` = num_heads, `head_dim` = hidden_size / num_heads,
    `intermediate_size` = 4 hidden_size for a plain MLP and 8/3 of it, rounded up to a multiple of 8, for a gated one,
    which has three matrices instead of two (Shazeer 2020, arXiv:2002.05202).
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 1024  # the longest sequence, cached tokens included
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    rope_theta: float = 10000.0  # base of the rotation's wavelengths
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    mlp: Literal["gated", "plain"] = "gated"
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True  # the LM head is the embedding matrix (Press & Wolf 2017, arXiv:1608.05859)
    dropout: float = 0.0  # on embeddings, attention weights and both sublayers' outputs
    init_std: float = 0.02

    def __post_init__(self):
        wrong = [f"{name}={getattr(self, name)}: must be at least 1" for name in _SIZES if not _is_size(self, name)]
        for name, choices in (("positions", POSITIONS), ("norm", NORMS), ("mlp", MLPS), ("activation", ACTIVATIONS)):
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}: did you mean {nearest(str(value), choices)}?")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout}: must be in [0, 1)")
        for name in ("rope_theta", "norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                wrong.append(f"{name}={getattr(self, name)}: must be a number above 0")
        if not 0.0 <= self.init_std < math.inf:
            wrong.append(f"init_std={self.init_std}: must be a number, at least 0")
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
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the one way to finish a frozen dataclass

    def _conflicts(self) -> list[str]:
        wrong = []
        if self.num_heads % self.num_kv_heads:
            wrong.append(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            wrong.append(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of features")
        return wrong


_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")
_SIZES += ("num_kv_heads", "head_dim", "intermediate_size")


def _is_size(config: ModelConfig, name: str) -> bool:
    value = getattr(config, name)
    return value is None or value >= 1
