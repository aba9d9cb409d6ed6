"""What encoders and decoders share: embeddings, blocks, and the final norm."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.layers import (
    MLPS,
    NORMS,
    Attention,
    Block,
    KVCache,
    LearnedPositions,
    RelativePositions,
    SinusoidalPositions,
)
from minillm.models.config import ModelConfig
from minillm.ops import causal_mask, rotary_table


class Stack(nn.Module):
    """Embeddings and `num_layers` blocks; `causal` hides later positions, `cross` lets each block read a memory.

    `tokenizer_fingerprint` names the tokenizer that the weights were trained with; None until one is known.
    `gradient_checkpointing` recomputes each block in the backward pass instead of keeping its activations
    (Chen et al. 2016, arXiv:1604.06174): about a third more time, memory that grows with one block instead of all.
    """

    def __init__(self, config: ModelConfig, num_layers: int, *, causal: bool, cross: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.tokenizer_fingerprint: str | None = None
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = _position_vectors(config)
        self.embed_types = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.embed_norm = _norm(config) if config.embed_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.relative_positions = _relative_positions(config, causal) if config.positions == "relative" else None
        self.layers = nn.ModuleList(_block(config, cross) for _ in range(num_layers))
        self.norm = _norm(config) if config.norm_first else nn.Identity()

    def tie_weights(self) -> None:
        """Tie what the config ties; of itself a stack has nothing to tie."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: N(0, init_std), biases 0; projections into the residual stream divided by sqrt(2 L).

        Each block adds twice to the stream, so 2 L additions keep its variance near one addition's; with
        cross-attention it adds three times.
        Source: Radford et al. 2019 (GPT-2), section 2.3.
        Where scores are not divided by sqrt(K), queries start smaller by it (Raffel et al. 2020, T5).
        """
        additions = len(self.layers) * (2 if self.layers[0].cross_attn is None else 3)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                unscaled = name.endswith("q_proj.weight") and self.config.positions == "relative"
                shrink = additions if into_stream else self.config.head_dim if unscaled else 1
                parameter.normal_(std=self.config.init_std / math.sqrt(shrink))

    def _run(
        self,
        tokens: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        *,
        token_types: Tensor | None = None,
        cache: list[KVCache] | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The final norm's output (B, T, D), or (B, 1, D) where only the states `at` (B,) are wanted."""
        if (tokens is None) == (embeds is None):
            raise ValueError("give either tokens or embeds")
        _check_bool(mask=mask, memory_mask=memory_mask)
        x = self._look_up(tokens) if embeds is None else embeds
        positions = self._positions(x, mask, positions, cache)
        x = self._embed(x, positions, token_types)
        shared = self._shared(x, mask, positions, cache)
        early = at is not None and self.config.positions != "rope"  # the turns are for queries and keys alike
        if memory_mask is not None:
            memory_mask = memory_mask[:, None, None, :]
        for i, layer in enumerate(self.layers):
            arguments = shared(i) | {"memory": memory, "memory_mask": memory_mask}
            if early and layer is self.layers[-1]:
                x, arguments = _narrowed(x, at, arguments)
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, use_reentrant=False, **arguments)
            else:
                x = layer(x, cache=cache[i] if cache else None, **arguments)
        return self.norm(x if at is None or early else _rows(x, at, dim=1))

    def _look_up(self, tokens: Tensor) -> Tensor:
        try:
            return self.embed_tokens(tokens)
        except IndexError:  # on a GPU it is an assertion of the device, which leaves nothing to add to
            low, high = tokens.min().item(), tokens.max().item()
            raise ValueError(
                f"token ids from {low} to {high}, but the vocabulary is 0..{self.config.vocab_size - 1}: use the "
                "model's own tokenizer, and -100 in labels only"
            ) from None

    def _embed(self, x: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        if self.config.scale_embeddings:  # up to the size of the sines: Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(self.config.hidden_size)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(x.dtype)
        if self.embed_types is not None:
            x = x + (self.embed_types.weight[0] if token_types is None else self.embed_types(token_types))
        return self.dropout(x if self.embed_norm is None else self.embed_norm(x))

    def _shared(self, x: Tensor, mask: Tensor | None, positions: Tensor, cache: list[KVCache] | None):
        """A function from a layer's index to what its attention is told: masks, turns, biases, made once for all."""
        queries, keys = x.shape[1], x.shape[1] + (cache[0].offset if cache else 0)
        if cache and len(cache) != len(self.layers):
            raise ValueError(f"cache has {len(cache)} entries for {len(self.layers)} layers: one for each")
        c, rotation, bias = self.config, None, None
        if c.positions == "rope":
            rotation = rotary_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        elif self.relative_positions is not None:
            bias = self.relative_positions(queries, keys).to(x.dtype)
        if mask is not None:
            mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        told = {"mask": mask, "causal": self.causal, "rotation": rotation, "bias": bias}
        return lambda i: told | {"window": c.window(i) if self.causal else 0}

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


def _narrowed(x: Tensor, at: Tensor, arguments: dict) -> tuple[Tensor, dict]:
    """What a block is told of whose outputs only `at` (B,) is read: one query, and the whole text as its context."""
    told = {"context": x}
    if arguments["causal"]:  # the one query is not the newest position: what it may see is said by a mask
        S = x.shape[1]
        seen = causal_mask(S, S, x.device, window=arguments["window"])[at][:, None, None]
        mask = arguments["mask"]
        told |= {"mask": seen if mask is None else seen & (mask if mask.shape[2] == 1 else _rows(mask, at, dim=2))}
        told |= {"causal": False, "window": 0}
        arguments = arguments | told
    for name in ("mask", "bias"):  # (B or 1, H or 1, T or 1, S)
        if arguments[name] is not None and arguments[name].shape[2] > 1:
            told[name] = _rows(arguments[name], at, dim=2)
    return _rows(x, at, dim=1), arguments | told


def _rows(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """Entry `at` (B,) of dimension `dim`, which stays."""
    return x.take_along_dim(at.view(-1, *[1] * (x.dim() - 1)), dim)


def _check_bool(**masks: Tensor | None) -> None:
    """Refuse masks of numbers: torch's attention would add those of a float mask to the scores, without a word."""
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"{name} is {mask.dtype}: masks are torch.bool here, True at real tokens; one of 1 and 0 needs .bool()"
            )


def _norm(config: ModelConfig) -> nn.Module:
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


def _position_vectors(config: ModelConfig) -> nn.Module | None:
    if config.positions == "learned":
        return LearnedPositions(config.max_positions, config.hidden_size)
    return SinusoidalPositions(config.hidden_size) if config.positions == "sinusoidal" else None


def _relative_positions(config: ModelConfig, causal: bool) -> RelativePositions:
    return RelativePositions(
        config.relative_buckets, config.relative_distance, config.num_heads, bidirectional=not causal
    )


def _block(config: ModelConfig, cross: bool) -> Block:
    mlp = MLPS[config.mlp](config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)
    return Block(
        _attention(config),
        mlp,
        lambda: _norm(config),
        cross_attn=_attention(config) if cross else None,
        dropout=config.dropout,
        norm_first=config.norm_first,
    )


def _attention(config: ModelConfig) -> Attention:
    return Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        bias=config.attention_bias,
        dropout=config.attention_dropout,
        scale=1.0 if config.positions == "relative" else None,
        qk_norm=(lambda size: NORMS[config.norm](size, config.norm_eps)) if config.qk_norm else None,
    )
