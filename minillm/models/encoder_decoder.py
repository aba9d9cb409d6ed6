"""The encoder-decoder: one stack reads the source, another writes the target and reads what the first has made."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.layers import KVCache
from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder
from minillm.models.encoder import Encoder


class EncoderDecoder(nn.Module):
    """The transformer as it was first drawn (Vaswani et al. 2017, arXiv:1706.03762, figure 1); T5's and BART's kind.

    Both sides share one embedding matrix. `tokens` are the decoder's inputs: the target moved right by one, behind
    `config.decoder_start_id`.
    """

    def __init__(self, config: ModelConfig, *, lm_head: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, lm_head=lm_head)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One embedding matrix for both sides, and for the LM head if the config says so."""
        self.decoder.embed_tokens = self.encoder.embed_tokens
        self.decoder.tie_weights()

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The tokenizer that the weights were trained with; None until one is known."""
        return self.encoder.tokenizer_fingerprint

    @tokenizer_fingerprint.setter
    def tokenizer_fingerprint(self, fingerprint: str | None) -> None:
        self.encoder.tokenizer_fingerprint = self.decoder.tokenizer_fingerprint = fingerprint

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether both sides recompute their blocks in the backward pass."""
        return self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's blocks, one cache for each."""
        return self.decoder.layers

    @property
    def lm_head(self) -> nn.Module | None:
        """The decoder's head over the vocabulary."""
        return self.decoder.lm_head

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embedding matrix of both sides."""
        return self.encoder.embed_tokens

    def forward(
        self,
        source: Int[Tensor, "B S"] | None = None,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        source_embeds: Float[Tensor, "B S D"] | None = None,
        source_mask: Bool[Tensor, "B S"] | None = None,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B Skv"] | Bool[Tensor, "B T Skv"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each of `tokens`, given the source.

        `source_mask` is True at the source's real tokens; the decoder's arguments are as in `Decoder.forward`.
        """
        x = self.hidden(
            source,
            tokens,
            source_embeds=source_embeds,
            source_mask=source_mask,
            embeds=embeds,
            mask=mask,
            positions=positions,
            cache=cache,
        )
        return x if self.lm_head is None else self.lm_head(x)

    def hidden(
        self,
        source: Int[Tensor, "B S"] | None = None,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        source_embeds: Float[Tensor, "B S D"] | None = None,
        source_mask: Bool[Tensor, "B S"] | None = None,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B Skv"] | Bool[Tensor, "B T Skv"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the LM head reads; arguments as in `forward`. With a filled `cache` the source is not read again."""
        memory = None
        if not (cache and cache[0].memory.filled):
            memory = self.encoder(source, embeds=source_embeds, mask=source_mask)
        return self.decoder.hidden(
            tokens,
            embeds=embeds,
            mask=mask,
            positions=positions,
            cache=cache,
            memory=memory,
            memory_mask=source_mask if memory is not None else None,
        )

    def encode(self, source: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B S D"]:
        """What the decoder reads: the encoder's output."""
        return self.encoder(source, mask=mask)

    def condition(self, source: Int[Tensor, "B S"], source_mask: Bool[Tensor, "B S"] | None = None) -> "Conditioned":
        """This model with its source fixed: a decoder, for all that generates from decoders."""
        return Conditioned(self, source, source_mask)


class Conditioned(nn.Module):
    """An encoder-decoder whose source is given has a decoder's interface: it continues target prefixes.

    The source is read when it is first needed, and kept in the cache's `memory` where there is a cache.
    """

    def __init__(self, model: nn.Module, source: Tensor, source_mask: Tensor | None):
        super().__init__()
        self.model, self.source, self.source_mask = model, source, source_mask
        self.config, self.tokenizer_fingerprint = model.config, model.tokenizer_fingerprint

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's blocks, one cache for each."""
        return self.model.layers

    @property
    def lm_head(self) -> nn.Module | None:
        """The decoder's head over the vocabulary."""
        return self.model.lm_head

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embedding matrix."""
        return self.model.embed_tokens

    def forward(self, tokens: Int[Tensor, "B T"] | None = None, **options) -> Float[Tensor, "B T V"]:
        """As `Decoder.forward`."""
        x = self.hidden(tokens, **options)
        return x if self.lm_head is None else self.lm_head(x)

    def hidden(
        self, tokens: Int[Tensor, "B T"] | None = None, *, cache: list[KVCache] | None = None, **options
    ) -> Float[Tensor, "B T D"]:
        """As `Decoder.hidden`; after `KVCache.reorder` the tokens may have other rows than the source had."""
        if cache and cache[0].memory.filled:
            return self.model.hidden(None, tokens, cache=cache, **options)
        return self.model.hidden(self.source, tokens, source_mask=self.source_mask, cache=cache, **options)
