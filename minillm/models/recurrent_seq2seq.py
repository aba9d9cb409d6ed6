"""The recurrent encoder-decoder with attention: the model that attention was invented for."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.layers import AdditiveAttention, KVCache, State
from minillm.layers.recurrent import padding_wrong
from minillm.models.encoder_decoder import Conditioned
from minillm.models.recurrent import RecurrentConfig, check_mask, keep_state, read_state


class RecurrentEncoderDecoder(nn.Module):
    """A bidirectional encoder; a decoder that at each step looks at all of the encoder's states by additive attention.

    Source: Bahdanau et al. 2015 (arXiv:1409.0473), section 3 and appendix A. As there, the decoder starts from the
    state with which the encoder's backward direction ends, attends with its previous state, and reads the context
    beside the last token. Where it differs: the cells are the config's (there a GRU), both sides share one embedding
    matrix, and the maxout layer before the head is a tanh layer, of the state after the step.
    `tokens` are the decoder's inputs: the target moved right by one, behind `config.decoder_start_id`.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        if config.truncate is not None:
            raise ValueError(f"truncate={config.truncate} is for a language model: an encoder-decoder reads one source")
        self.config = config
        self.tokenizer_fingerprint: str | None = None
        hidden, memory = config.hidden_size, 2 * config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_size)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = config.layers(config.embed_size, bidirectional=True)
        self.start_proj = nn.Linear(hidden, config.num_layers * hidden)
        self.cross_attn = AdditiveAttention(hidden, memory, hidden)
        self.decoder = config.layers(config.embed_size + memory)
        head_size = config.embed_size if config.tie_embeddings else hidden
        self.out_proj = nn.Linear(hidden + memory + config.embed_size, head_size)
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
        """The decoder's layers, one cache for each."""
        return self.decoder.layers

    def condition(self, source: Int[Tensor, "B S"], source_mask: Bool[Tensor, "B S"] | None = None) -> Conditioned:
        """This model with its source fixed: a decoder, for all that generates from decoders."""
        return Conditioned(self, source, source_mask)

    def encode(self, source: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B S M"]:
        """The states of both directions at each source position, side by side; zeros at padding."""
        return self.encoder(self.dropout(self.embed_tokens(source)), mask=mask)[0]

    def forward(
        self,
        source: Int[Tensor, "B S"] | None,
        tokens: Int[Tensor, "B T"],
        *,
        source_mask: Bool[Tensor, "B S"] | None = None,
        memory: Float[Tensor, "B S M"] | None = None,
        mask: Bool[Tensor, "B T0"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each of `tokens`, given the source; arguments as in `hidden`."""
        given = dict(source_mask=source_mask, memory=memory, mask=mask, positions=positions, cache=cache)
        return self.lm_head(self.hidden(source, tokens, **given))

    def hidden(
        self,
        source: Int[Tensor, "B S"] | None,
        tokens: Int[Tensor, "B T"],
        *,
        source_mask: Bool[Tensor, "B S"] | None = None,
        memory: Float[Tensor, "B S M"] | None = None,
        mask: Bool[Tensor, "B T0"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the LM head reads, after each of `tokens`.

        `source_mask` is True at the source's real tokens. `memory` = encode(source, source_mask) stands in for the
        source. mask, positions and cache speak of `tokens`, as in `RecurrentLM.hidden`; a cache also keeps the memory,
        and then the source is not read again.
        """
        return self._decode(source, tokens, source_mask, memory, mask, positions, cache)[0]

    @torch.no_grad()
    def attention_weights(
        self, source: Int[Tensor, "B S"], tokens: Int[Tensor, "B T"], *, source_mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B T S"]:
        """How much each of `tokens`, on its way to the next one, reads from each source position; without dropout."""
        training = self.training
        try:
            return self.eval()._decode(source, tokens, source_mask)[1]
        finally:
            self.train(training)

    def _decode(
        self, source, tokens, source_mask=None, memory=None, mask=None, positions=None, cache=None
    ) -> tuple[Tensor, Tensor]:
        """What the head reads (B, T, D), and the attention weights (B, T, S)."""
        x = self.dropout(self.embed_tokens(tokens))
        mask = check_mask(mask, positions, cache, x)
        state = read_state(cache, self.decoder)
        memory, keys, source_mask = self._memory(source, source_mask, memory, cache)
        if len(memory) != len(x):
            raise ValueError(f"the source has {len(memory)} rows and the target {len(x)}: they come in pairs")
        state = self._start(memory, source_mask) if state is None else state
        readouts, weights = [], []
        for t, x_t in enumerate(x.unbind(1)):
            weights.append(self.cross_attn.weights(state.h[-1], memory, mask=source_mask, keys=keys))
            context = (weights[-1][:, None] @ memory).squeeze(1)
            y, new = self.decoder(torch.cat([x_t, context], dim=-1)[:, None], state=state)
            state = new if mask is None else new.where(mask[:, t, None], state)
            readouts.append(torch.cat([y[:, 0], context, x_t], dim=-1))
        keep_state(cache, state, x.shape[1])
        hidden = self.out_proj(self.dropout(torch.stack(readouts, dim=1))).tanh()
        return hidden, torch.stack(weights, dim=1)

    def _memory(
        self, source: Tensor | None, mask: Tensor | None, memory: Tensor | None, cache: list[KVCache] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The encoder's states, their keys and their mask: from the cache, as given, or by reading the source."""
        kept = cache[0].memory if cache else None
        if kept is not None and kept.filled:
            return kept.values, kept.keys, kept.mask
        if (source is None) == (memory is None):
            raise ValueError("give either source or memory")
        if memory is None:
            memory = self.encode(source, mask)
        elif mask is not None:
            wrong = padding_wrong(mask) if mask.shape == memory.shape[:2] else [f"mask has shape {tuple(mask.shape)}"]
            if wrong:
                raise ValueError(f"source_mask does not fit memory of shape {tuple(memory.shape)}: " + "; ".join(wrong))
        keys = self.cross_attn.k_proj(memory)
        if kept is not None:
            kept.keys, kept.values, kept.mask = keys.detach(), memory.detach(), mask  # as the state is
        return memory, keys, mask

    def _start(self, memory: Tensor, mask: Tensor | None) -> State:
        """The decoder's first state, h = tanh(W backward state at the first source token) in all layers, and c = 0."""
        rows = torch.arange(len(memory), device=memory.device)
        first = torch.zeros_like(rows) if mask is None else mask.long().argmax(-1)
        ended = memory[rows, first, self.config.hidden_size :]
        h = self.start_proj(ended).tanh().unflatten(-1, (self.config.num_layers, -1)).transpose(0, 1)
        return State(h, torch.zeros_like(h) if self.config.cell == "lstm" else None)
