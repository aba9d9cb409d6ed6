"""The decoder-only language model: embeddings, a stack of causal blocks, a final norm, a head over the vocabulary."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.layers import MLPS, NORMS, Attention, Block, KVCache, LearnedPositions, SinusoidalPositions
from minillm.models.config import ModelConfig
from minillm.ops import causal_mask, rotary_table


class Decoder(nn.Module):
    """Predicts each next token from the tokens before it: GPT-2's and Llama's kind (Radford et al. 2019).

    `tokenizer_fingerprint` names the tokenizer that the weights were trained with; None until one is known.
    `gradient_checkpointing` recomputes each block in the backward pass instead of keeping its activations
    (Chen et al. 2016, arXiv:1604.06174): about a third more time, memory that grows with one block instead of all.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokenizer_fingerprint: str | None = None
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = _position_vectors(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the LM head read the embedding matrix itself, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: N(0, init_std), biases 0; projections into the residual stream divided by sqrt(2 L).

        Each block adds twice to the stream, so 2 L additions keep its variance near one addition's.
        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(std=self.config.init_std / math.sqrt(2 * len(self.layers) if into_stream else 1))

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B S"] | Bool[Tensor, "B T S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position.

        Give `tokens`, or `embeds` to start from vectors instead. `mask` is True at real tokens, over all S = cached +
        new positions, or says for each query which keys it may see; later positions stay hidden either way.
        `positions` count real tokens from 0 unless given, so padding on the left shifts nothing.
        `cache`: one per layer, filled by this call.
        """
        return self.lm_head(self.hidden(tokens, embeds=embeds, mask=mask, positions=positions, cache=cache))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B S"] | Bool[Tensor, "B T S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The final norm's output, which the LM head reads; arguments as in `forward`."""
        if (tokens is None) == (embeds is None):
            raise ValueError("give either tokens or embeds")
        x = self.embed_tokens(tokens) if embeds is None else embeds
        positions = self._positions(x, mask, positions, cache)
        rotation = None
        if self.config.positions == "rope":
            rotation = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        elif self.config.positions == "learned":
            x = x + self.embed_positions(positions)
        else:  # the sines have size 1, so the embeddings are scaled up to it: Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(self.config.hidden_size) + self.embed_positions(positions).to(x.dtype)
        x = self.dropout(x)
        mask = _attention_mask(mask, x.shape[1])
        for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, mask=mask, causal=mask is None, rotation=rotation, use_reentrant=False)
            else:
                x = layer(x, mask=mask, causal=mask is None, rotation=rotation, cache=layer_cache)
        return self.norm(x)

    def _positions(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: list[KVCache] | None
    ) -> Tensor:
        offset, length = cache[0].offset if cache else 0, x.shape[1]
        if offset + length > self.config.max_positions:
            raise ValueError(
                f"the sequence has {offset + length} positions and the model at most "
                f"max_positions={self.config.max_positions}: shorten the prompt, generate less, or train a longer model"
            )
        if mask is not None and mask.shape[-1] != offset + length:
            raise ValueError(
                f"mask speaks of {mask.shape[-1]} positions, but there are {offset} cached and {length} new ones"
            )
        if positions is not None:
            return positions
        if mask is not None and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(offset, offset + length, device=x.device)


def build(config: ModelConfig) -> Decoder:
    """A new model with random weights."""
    return Decoder(config)


def _attention_mask(mask: Tensor | None, queries: int) -> Tensor | None:
    """(B, S) or (B, T, S) of what is real, to (B, 1, T, S) of what may be seen; None means causal and nothing else."""
    if mask is None:
        return None
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    return mask & causal_mask(queries, mask.shape[-1], mask.device)


def _position_vectors(config: ModelConfig) -> nn.Module | None:
    if config.positions == "learned":
        return LearnedPositions(config.max_positions, config.hidden_size)
    return SinusoidalPositions(config.hidden_size) if config.positions == "sinusoidal" else None


def _block(config: ModelConfig) -> Block:
    return Block(
        Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.attention_bias,
            dropout=config.dropout,
        ),
        MLPS[config.mlp](config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias),
        lambda: NORMS[config.norm](config.hidden_size, config.norm_eps),
        dropout=config.dropout,
    )
