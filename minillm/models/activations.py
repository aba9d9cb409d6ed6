"""What a model keeps from its forward pass for its backward pass, counted from its config.

Follows Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), who count one block. Ours differs where our layers do:
fused attention never stores T x T weights, SwiGLU makes its product again in the backward pass, and the input of a
layer that does not train is not kept.
"""

from dataclasses import dataclass

from minillm.models.config import ModelConfig

QKV, UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Keeping:
    """Bytes that the blocks of a model keep for B rows of T positions.

    `readers`: the linear layers that train, themselves or by an adapter of `adapter_rank`. `wide`, `narrow`: bytes of a
    value between sublayers and within one; they differ under autocast, where each reader keeps a copy of its own.
    `cpu`: where dropout keeps floats, and attention stores its weights if they drop out or a relative bias trains.
    """

    config: ModelConfig
    readers: tuple[str, ...]
    trains_bias: bool
    adapter_rank: int
    wide: int
    narrow: int
    cpu: bool

    def blocks(self, rows: int, length: int, source_length: int) -> list[int]:
        """Of each block, an encoder-decoder's encoder first."""
        c = self.config
        if c.kind == "encoder":
            return [self._block(rows, length)] * c.num_layers
        if c.kind == "decoder":
            return [self._block(rows, length, causal=True, window=c.window(i)) for i in range(c.num_layers)]
        writing = self._block(rows, length, causal=True) + self._cross_attention(rows, length, source_length)
        return [self._block(rows, source_length)] * c.num_layers + [writing] * c.num_decoder_layers

    def inputs(self, rows: int, length: int, source_length: int) -> int:
        """Of each block its input only, as with gradient checkpointing."""
        c = self.config
        positions = c.num_layers * (source_length if c.kind == "encoder_decoder" else length)
        positions += (c.num_decoder_layers or 0) * length
        return rows * positions * self.wide * c.hidden_size

    def around(self, rows: int, length: int, source_length: int) -> int:
        """Outside the blocks: norms and dropout of the embeddings, the final norms, what the head reads."""
        c, bias = self.config, 0
        stacks = [source_length, length] if c.kind == "encoder_decoder" else [length]
        positions = sum(stacks) * (1 + c.norm_first + c.embed_norm)
        if self._biased and c.kind != "decoder":
            bias = c.num_heads * stacks[0] ** 2 * self.narrow  # one for all of the encoder's layers
        dropout = sum(rows * tokens * self._dropout(self.wide) for tokens in stacks)
        return rows * positions * self.wide * c.hidden_size + dropout + bias

    def passing(self, rows: int, length: int) -> int:
        """What comes and goes in the backward pass of one block: in its MLP, or where attention stored its weights."""
        c = self.config
        inner = (3 if c.mlp == "gated" else 2) - ("down_proj" in self.readers)  # whose input goes when it is done
        weights = rows * c.num_heads * length**2 * self.narrow if self._stores_weights else 0
        weights *= 1 if c.attention_dropout else 2
        return max(rows * length * inner * self.narrow * c.intermediate_size, weights)

    @property
    def _stores_weights(self) -> bool:
        return self.cpu and (bool(self.config.attention_dropout) or (self._biased and self.trains_bias))

    @property
    def _biased(self) -> bool:
        return self.config.positions == "relative"

    def _block(self, rows: int, length: int, *, causal: bool = False, window: int = 0) -> int:
        return self._self_attention(rows, length, causal, window) + self._mlp(rows * length)

    def _self_attention(self, rows: int, length: int, causal: bool, window: int) -> int:
        c, pairs, tokens = self.config, length**2 * self.narrow, rows * length
        kept = self._sublayer(tokens, QKV) + self._heads(tokens, tokens)
        if self._stores_weights:  # where they drop out: the softmax, what dropped out, what is left
            kept += (3 if c.attention_dropout else 1) * rows * c.num_heads * pairs
        elif self._biased and causal:
            kept += c.num_heads * pairs  # the bias with later positions hidden
        elif 0 < window < length:
            kept += pairs  # the mask, as numbers to be added
        return kept

    def _cross_attention(self, rows: int, length: int, source_length: int) -> int:
        tokens, memory = rows * length, rows * source_length
        kept = self._sublayer(tokens, ("q_proj",)) + self._heads(tokens, memory)
        if self.wide != self.narrow:
            kept += memory * self._copies(("k_proj", "v_proj"))  # else all layers read one memory
        kept += memory * self._adapters(("k_proj", "v_proj"))
        if self.cpu and self.config.attention_dropout:
            kept += 3 * rows * self.config.num_heads * length * source_length * self.narrow
        return kept

    def _sublayer(self, tokens: int, readers: tuple[str, ...]) -> int:
        """The norm's input, what the sublayer's first layers read, and the mask of the dropout at its end."""
        norm = self.wide * self.config.hidden_size
        return tokens * (norm + self._copies(readers) + self._adapters(readers) + self._dropout(self.narrow))

    def _heads(self, queries: int, keys: int) -> int:
        """Queries, keys, values, output, and each query's normaliser in float32."""
        c = self.config
        q, k = queries * c.num_heads * c.head_dim, keys * c.num_kv_heads * c.head_dim
        normed = q + k if c.qk_norm else 0
        return (
            self.narrow * (2 * q + 2 * k + normed) + 4 * queries * c.num_heads + queries * self._adapters(("o_proj",))
        )

    def _mlp(self, tokens: int) -> int:
        c = self.config
        if c.mlp == "plain":  # ReLU keeps its output, which is also what down_proj reads; others their input
            inner = 1 if c.activation == "relu" else 1 + ("down_proj" in self.readers)
        else:
            inner = {"silu": 2, "relu": 2}.get(c.activation, 3) + ("down_proj" in self.readers)
        values = self.narrow * inner * c.intermediate_size + self._adapters(("down_proj",))
        return self._sublayer(tokens, UP) + tokens * values

    def _copies(self, readers: tuple[str, ...]) -> int:
        """Bytes per position of what these layers read: one tensor for all, or under autocast one for each."""
        count = sum(name in self.readers for name in readers)
        return (count if self.wide != self.narrow else min(count, 1)) * self.narrow * self.config.hidden_size

    def _adapters(self, readers: tuple[str, ...]) -> int:
        return 4 * self.adapter_rank * sum(name in self.readers for name in readers)

    def _dropout(self, size: int) -> int:
        return (size if self.cpu else 1) * self.config.hidden_size if self.config.dropout else 0
