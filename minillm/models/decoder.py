"""The decoder: embeddings, a stack of causal blocks, a final norm, a head over the vocabulary."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.layers import KVCache
from minillm.models.config import ModelConfig
from minillm.models.stack import Stack


class Decoder(Stack):
    """Predicts each next token from the tokens before it: GPT-2's and Llama's kind (Radford et al. 2019).

    In an encoder-decoder its blocks also read a `memory`, the encoder's output. With `lm_head=False` there is no head
    over the vocabulary and the model returns hidden states, for other heads to read.
    """

    def __init__(self, config: ModelConfig, *, lm_head: bool = True):
        cross = config.kind == "encoder_decoder"
        super().__init__(config, config.num_decoder_layers if cross else config.num_layers, causal=True, cross=cross)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head else None
        self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the LM head read the embedding matrix itself, if the config says so."""
        if self.config.tie_embeddings and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B S"] | Bool[Tensor, "B T S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
        memory: Float[Tensor, "B S2 D"] | None = None,
        memory_mask: Bool[Tensor, "B S2"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position.

        Give `tokens`, or `embeds` to start from vectors instead. `mask` is True at real tokens, over all S = cached +
        new positions, or says for each query which keys it may see; later positions stay hidden either way.
        `positions` count real tokens from 0 unless given, so padding on the left shifts nothing.
        `cache`: one per layer, filled by this call. `memory` and its `memory_mask` are for an encoder-decoder's.
        """
        x = self.hidden(
            tokens,
            embeds=embeds,
            mask=mask,
            positions=positions,
            cache=cache,
            memory=memory,
            memory_mask=memory_mask,
        )
        return x if self.lm_head is None else self.lm_head(x)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B S"] | Bool[Tensor, "B T S"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
        memory: Float[Tensor, "B S2 D"] | None = None,
        memory_mask: Bool[Tensor, "B S2"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the LM head reads: the final norm's output times `logit_scale`; arguments as in `forward`."""
        self._check_memory(tokens if embeds is None else embeds, memory, cache)
        x = self._run(tokens, embeds, mask, positions, cache=cache, memory=memory, memory_mask=memory_mask)
        return x if self.lm_head is None or self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def _check_memory(self, x: Tensor | None, memory: Tensor | None, cache: list[KVCache] | None) -> None:
        reads = self.config.kind == "encoder_decoder"
        if reads and memory is None and not (cache and cache[0].memory.filled):
            raise ValueError("this decoder reads an encoder's output: give memory, or call the whole encoder-decoder")
        if memory is not None and not reads:
            raise ValueError(f"memory is for an encoder-decoder's decoder, not kind={self.config.kind!r}")
        if memory is not None and x is not None and len(memory) != len(x):
            raise ValueError(
                f"{len(memory)} sources for {len(x)} rows of tokens: one for each (repeat_interleave them)"
            )
