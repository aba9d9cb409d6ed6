"""The encoder: every position sees every other, so the output at each is a reading of the whole text."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.models.config import ModelConfig
from minillm.models.stack import Stack


class Encoder(Stack):
    """Embeddings and blocks without a causal mask: BERT's kind (Devlin et al. 2018, arXiv:1810.04805).

    It ends in hidden states; `models/heads.py` has what reads them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.num_layers, causal=False)
        self.reset_parameters()

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B T"] | Bool[Tensor, "B T T"] | None = None,
        token_types: Int[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden state of each position.

        Give `tokens`, or `embeds` to start from vectors instead. `mask` is True at real tokens, or says for each query
        which keys it may see. `token_types` name the segment each token is of, 0 unless given.
        `positions` count real tokens from 0 unless given, so padding on the left shifts nothing.
        """
        return self.hidden(tokens, embeds=embeds, mask=mask, token_types=token_types, positions=positions)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T D"] | None = None,
        mask: Bool[Tensor, "B T"] | Bool[Tensor, "B T T"] | None = None,
        token_types: Int[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "T"] | Int[Tensor, "B T"] | None = None,
        at: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """The same as `forward`, under the name that heads ask of every model.

        With `at`, only each row's state at that position, (B, 1, D): the last block computes no other.
        """
        if token_types is not None and self.embed_types is None:
            raise ValueError("this encoder knows no token types (token_types=0 in its config): leave them out")
        return self._run(tokens, embeds, mask, positions, token_types=token_types, at=at)
