"""How large is a model? Parameters, bytes, key/value cache and arithmetic, from its config alone: nothing is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from minillm.config import nearest
from minillm.models.cards import find_card
from minillm.models.config import ModelConfig

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5}  # of one weight
NF4_BLOCK = 64  # weights that share one float32 scale: 4 + 32/64 = 4.5 bits each
DTYPES = tuple(BYTES)


class Matrix(NamedTuple):
    """The weight of a linear layer, outputs x inputs, of which a model has `copies` in as many places."""

    inputs: int
    outputs: int
    bias: bool
    copies: int

    @property
    def weights(self) -> int:
        """Values in all copies, without the biases."""
        return self.inputs * self.outputs * self.copies

    @property
    def biases(self) -> int:
        """Values in the biases of all copies."""
        return self.bias * self.outputs * self.copies


@dataclass(frozen=True)
class ModelSize:
    """The sizes that follow from `config`. An encoder is counted bare, other kinds with their LM head.

    `parameters`: by part, "total" last; a shared matrix counts once, so a tied head is in "embedding".
    `matrices`: the linear layers of attention and MLPs by name, those that LoRA adapts and quantisation shrinks.
    """

    config: ModelConfig
    parameters: Mapping[str, int]
    matrices: Mapping[str, Matrix]

    @property
    def total(self) -> int:
        """All parameters."""
        return self.parameters["total"]

    @property
    def quantised(self) -> int:
        """Parameters that int8 and NF4 shrink: the weights of attention and MLPs."""
        return sum(matrix.weights for matrix in self.matrices.values())

    def bytes(self, dtype: str = "bfloat16") -> int:
        """Of all parameters: 4 each in "float32", 2 in "bfloat16".

        "int8": attention's and the MLPs' matrices take one byte per weight and a float32 scale per output feature
        (Dettmers et al. 2022, arXiv:2208.07339, section 2.1). "nf4": half a byte per weight and a float32 scale per
        block of 64 (Dettmers et al. 2023, arXiv:2305.14314, section 3; quantising the scales too would save another
        0.37 bits per weight). Embeddings, norms, biases and the head stay bfloat16 in both.
        """
        if dtype not in BYTES:
            raise ValueError(f"dtype={dtype!r}: did you mean {nearest(dtype, DTYPES)}?")
        if dtype in ("float32", "bfloat16"):
            return int(self.total * BYTES[dtype])
        scales = sum(_scales(matrix, dtype) for matrix in self.matrices.values())
        return int(2 * (self.total - self.quantised) + BYTES[dtype] * self.quantised + 4 * scales)

    def kv_cache_bytes(self, length: int, *, source_length: int = 0, dtype: str = "bfloat16") -> int:
        """Keys and values that one row needs to go on after `length` tokens.

        A layer with a sliding window needs no more than its window (`KVCache` keeps all the same). A decoder that
        reads a memory also keeps the keys and values of the source's `source_length` tokens; an encoder keeps none.
        """
        c = self.config
        if c.kind == "encoder":
            return 0
        layers = decoder_layers(c)
        seen = sum(min(length, c.window(layer) or length) for layer in range(layers))
        seen += layers * source_length if c.kind == "encoder_decoder" else 0
        return int(2 * c.num_kv_heads * c.head_dim * seen * BYTES[dtype])

    def lora_parameters(self, rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> int:
        """Trainable values of a LoRA on the layers of these names: R (Din + Dout) each (arXiv:2106.09685)."""
        adapted = (self.matrices[name] for name in lora_targets(self, targets))
        return sum(rank * (matrix.inputs + matrix.outputs) * matrix.copies for matrix in adapted)

    def forward_flops(self, length: int, *, source_length: int | None = None) -> int:
        """Floating-point operations to run one row of `length` tokens forward, the head's included.

        2 for each weight and token that meets it (a product and a sum), and 4 K per head for each pair of a query
        and a key it sees: the score, and the value's share (Kaplan et al. 2020, arXiv:2001.08361, table 1, counts a
        causal row's mean of T/2 keys). Norms, activations and rotations are left out: less than a hundredth.
        An encoder-decoder reads `source_length` tokens (`length` unless given) and writes `length`.
        """
        source = length if source_length is None else source_length
        c, m = self.config, self.matrices
        per_attention = {name: m[name].inputs * m[name].outputs for name in ATTENTION}
        mlp = sum(m[name].inputs * m[name].outputs for name in m if name not in ATTENTION)
        block, pair = sum(per_attention.values()) + mlp, 4 * c.num_heads * c.head_dim
        head = 2 * length * c.vocab_size * c.hidden_size
        if c.kind == "encoder":
            return c.num_layers * (2 * length * block + pair * length**2)
        layers = decoder_layers(c)
        pairs = sum(_causal_pairs(length, c.window(layer)) for layer in range(layers))
        own = layers * 2 * length * block + pair * pairs + head
        if c.kind == "decoder":
            return own
        reading = c.num_layers * (2 * source * block + pair * source**2)
        memory = 2 * source * (per_attention["k_proj"] + per_attention["v_proj"])
        queries = 2 * length * (per_attention["q_proj"] + per_attention["o_proj"])
        return own + reading + layers * (memory + queries + pair * length * source)

    def flops_per_token(self, length: int, *, training: bool = False) -> float:
        """Of a row of `length` tokens; training costs 3 times a forward pass, which is the familiar 6 N for 2 N.

        The backward pass needs each product twice: for the gradient of its input and of its weight (Kaplan et al.
        2020, section 2.1). A LoRA leaves most of the second out: 4 N. For an encoder-decoder N is shared between
        source and target tokens, `length` of each.
        """
        tokens = 2 * length if self.config.kind == "encoder_decoder" else length
        return self.forward_flops(length) / tokens * (3 if training else 1)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def model_size(model: ModelConfig | str) -> ModelSize:
    """Count what `build(config)` would have, of a config or of the card of that name; see `ModelSize`.

    Example: `model_size("llama-3.1-8b").bytes("nf4")`.
    """
    c = find_card(model).config if isinstance(model, str) else model
    stacks = 2 if c.kind == "encoder_decoder" else 1
    matrices = _matrices(c)
    norm = (2 if c.norm == "layer" else 1) * c.hidden_size
    blocks = c.num_layers + (c.num_decoder_layers or 0)
    crossing = c.num_decoder_layers or 0
    norms = norm * (2 * blocks + crossing + stacks * (c.norm_first + c.embed_norm))
    norms += c.qk_norm * 2 * (2 if c.norm == "layer" else 1) * c.head_dim * (blocks + crossing)
    table = c.vocab_size * c.hidden_size
    positions = stacks * c.max_positions * c.hidden_size if c.positions == "learned" else 0
    relative = stacks * c.relative_buckets * c.num_heads if c.positions == "relative" else 0
    values = {name: matrix.weights + matrix.biases for name, matrix in matrices.items()}
    parameters = {
        "embedding": table + positions + c.token_types * c.hidden_size,
        "attention": sum(values[name] for name in ATTENTION) + relative,
        "mlp": sum(values[name] for name in values if name not in ATTENTION),
        "norms": norms,
        "head": 0 if c.tie_embeddings or c.kind == "encoder" else table,
    }
    parameters["total"] = sum(parameters.values())
    return ModelSize(c, MappingProxyType(parameters), MappingProxyType(matrices))


def lora_targets(size: ModelSize, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the adapted linear layers; "all-linear" means all. ValueError for a name that is none."""
    if unknown := [name for name in targets if name not in (*size.matrices, "all-linear")]:
        known = ", ".join(size.matrices)
        raise ValueError(
            f"this model has no linear layers called {', '.join(unknown)}: choose from {known}, all-linear"
        )
    return tuple(name for name in size.matrices if name in targets or "all-linear" in targets)


def _matrices(c: ModelConfig) -> dict[str, Matrix]:
    """Every linear layer of the blocks; a decoder that reads a memory has its attention twice in each block."""
    blocks = c.num_layers + (c.num_decoder_layers or 0)
    attentions = blocks + (c.num_decoder_layers or 0)
    queries, keys, bias = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, bool(c.attention_bias)
    matrices = {
        "q_proj": Matrix(c.hidden_size, queries, bias, attentions),
        "k_proj": Matrix(c.hidden_size, keys, bias, attentions),
        "v_proj": Matrix(c.hidden_size, keys, bias, attentions),
        "o_proj": Matrix(queries, c.hidden_size, c.attention_bias is True, attentions),
    }
    up = Matrix(c.hidden_size, c.intermediate_size, c.mlp_bias, blocks)
    matrices |= {"gate_proj": up, "up_proj": up} if c.mlp == "gated" else {"up_proj": up}
    return matrices | {"down_proj": Matrix(c.intermediate_size, c.hidden_size, c.mlp_bias, blocks)}


def _scales(matrix: Matrix, dtype: str) -> int:
    if dtype == "int8":
        return matrix.outputs * matrix.copies
    return -(-matrix.inputs * matrix.outputs // NF4_BLOCK) * matrix.copies


def decoder_layers(c: ModelConfig) -> int:
    return c.num_decoder_layers or c.num_layers


def _causal_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, itself among them."""
    seen = min(window or length, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen
