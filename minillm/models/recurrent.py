"""The recurrent language model: what came before attention, and what it is measured against."""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.config import nearest
from minillm.layers import CELLS, KVCache, Recurrent, State
from minillm.layers.cells import CELL_ACTIVATIONS
from minillm.layers.recurrent import padding_wrong


@dataclass(frozen=True)
class RecurrentConfig:
    """The shape of a recurrent language model or encoder-decoder."""

    max_positions: ClassVar[int] = sys.maxsize  # it reads on for ever

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 1  # an encoder-decoder has as many on each side
    embed_size: int | None = None  # None: hidden_size
    cell: Literal["rnn", "lstm"] = "lstm"
    activation: Literal["tanh", "relu", "linear"] = "tanh"  # of the rnn
    dropout: float = 0.0  # on embeddings, between layers and on the last one's output; never from step to step
    tie_embeddings: bool = True  # the LM head is the embedding matrix (Press & Wolf 2017, arXiv:1608.05859)
    truncate: int | None = None  # a language model's gradient passes at most so many steps back; None: all
    decoder_start_id: int = 0  # what an encoder-decoder's target begins with
    init_std: float = 0.1  # of the embeddings and the head; the cells draw theirs by their size

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_layers", "embed_size", "truncate")
        values = {name: getattr(self, name) for name in sizes}
        wrong = [f"{name}={size}: must be at least 1" for name, size in values.items() if size is not None and size < 1]
        for name, choices in (("cell", CELLS), ("activation", CELL_ACTIVATIONS)):
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}: did you mean {nearest(str(value), choices)}?")
        if self.cell == "lstm" and self.activation != "tanh":
            wrong.append(f"activation={self.activation!r} is for cell='rnn'; an LSTM's is tanh")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout}: must be in [0, 1)")
        if not 0 <= self.decoder_start_id < max(self.vocab_size, 1):
            wrong.append(
                f"decoder_start_id={self.decoder_start_id}: must be in the vocabulary 0..{self.vocab_size - 1}"
            )
        if not 0.0 <= self.init_std < float("inf"):
            wrong.append(f"init_std={self.init_std}: must be a number, at least 0")
        if wrong:
            raise ValueError("this recurrent model cannot be built:\n  " + "\n  ".join(wrong))
        if self.embed_size is None:
            object.__setattr__(self, "embed_size", self.hidden_size)  # the one way to finish a frozen dataclass

    def layers(self, input_size: int, **options) -> Recurrent:
        """A stack of this config's layers, reading vectors of `input_size`."""
        chosen = {name: getattr(self, name) for name in ("cell", "activation", "dropout")}
        return Recurrent(input_size, self.hidden_size, self.num_layers, **chosen, **options)


class RecurrentLM(nn.Module):
    """Predicts each next token from a state that has read all tokens before it.

    Source: Mikolov et al. 2010 (Interspeech, RNN); Zaremba et al. 2014 (arXiv:1409.2329, LSTM and where dropout goes).
    It has a Decoder's interface: training and generation take it as they take a Decoder. A tied head needs vectors of
    `embed_size`, so `out_proj` maps to them where `hidden_size` is another.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        self.tokenizer_fingerprint: str | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_size)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrent = config.layers(config.embed_size)
        projects = config.tie_embeddings and config.embed_size != config.hidden_size
        self.out_proj = nn.Linear(config.hidden_size, config.embed_size) if projects else nn.Identity()
        head_size = config.embed_size if config.tie_embeddings else config.hidden_size
        self.lm_head = nn.Linear(head_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=config.init_std)
        nn.init.normal_(self.lm_head.weight, std=config.init_std)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the LM head read the embedding matrix itself, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The recurrent layers, one cache for each."""
        return self.recurrent.layers

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T E"] | None = None,
        mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position; arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, embeds=embeds, mask=mask, positions=positions, cache=cache))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T E"] | None = None,
        mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the LM head reads, after each position.

        Give `tokens`, or `embeds` to start from vectors instead. `mask` (B, S) is True at real tokens, over all S =
        earlier + new positions; padding may be on either side, and what is computed there means nothing.
        `cache`: one per layer, holds the state (h as keys, c as values), so that the next call goes on where this one
        ended. It is detached: no gradient passes from one call into the one before (truncated backpropagation through
        time; within a call, `config.truncate` does the same). `positions` are not needed, for a state knows no other
        order than that of reading; if given they must count the real tokens from 0.
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("give either tokens or embeds")
        x = self.dropout(self.embed_tokens(tokens) if embeds is None else embeds)
        mask = check_mask(mask, positions, cache, x)
        y, state = self.recurrent(x, mask=mask, state=read_state(cache, self.recurrent), truncate=self.config.truncate)
        keep_state(cache, state, x.shape[1])
        return self.out_proj(self.dropout(y))


def read_state(cache: list[KVCache] | None, recurrent: Recurrent) -> State | None:
    """The state that `cache` holds; None if it holds nothing yet. Raises ValueError for caches of another kind."""
    if cache is None:
        return None
    if len(cache) != len(recurrent.layers) or any(type(c) is not KVCache or c.prefix_length for c in cache):
        raise ValueError(
            f"a recurrent model keeps its state in {len(recurrent.layers)} plain KVCaches, one per layer, without a "
            f"prefix; got {len(cache)}: {', '.join(type(c).__name__ for c in cache)}"
        )
    if not cache[0].offset:
        return None
    h = torch.stack([layer_cache.keys for layer_cache in cache])
    if "c" not in recurrent.layers[0][0].remembers:
        return State(h)
    return State(h, torch.stack([layer_cache.values for layer_cache in cache]))


def keep_state(cache: list[KVCache] | None, state: State, length: int) -> None:
    """Leave the detached state after `length` new positions in `cache`, rows first, so that `reorder` works."""
    state = state.detach()
    for i, layer_cache in enumerate(cache or ()):
        layer_cache.keys, layer_cache.values = state.h[i], (state.h if state.c is None else state.c)[i]
        layer_cache.offset += length


def check_mask(mask: Tensor | None, positions: Tensor | None, cache: list[KVCache] | None, x: Tensor) -> Tensor | None:
    """The part of `mask` (B, S) that speaks of x (B, T, E), the newest positions.

    Raises ValueError where mask or positions ask for what a recurrent net cannot do, such as skipping back.
    """
    offset, (batch_size, length) = cache[0].offset if cache else 0, x.shape[:2]
    shape, wrong = (batch_size, offset + length), []
    if mask is not None and mask.shape != shape:
        wrong.append(f"mask has shape {tuple(mask.shape)}: need {shape}, True at real tokens (a recurrent net reads on")
        wrong[-1] += " through a window: cut it at documents, isolate_documents=False)"
    elif mask is not None:
        wrong += padding_wrong(mask)
    if positions is not None and not wrong:
        real = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask
        counted = (real.long().cumsum(-1) - 1).clamp(min=0)[:, offset:]
        if not torch.equal(positions.expand_as(counted) if positions.dim() == 1 else positions, counted):
            wrong.append("positions do not count the real tokens from 0: a recurrent net cannot jump; leave them out")
    if wrong:
        raise ValueError("a recurrent model cannot read this:\n  " + "\n  ".join(wrong))
    return None if mask is None else mask[:, offset:]
