"""Additive attention: how a recurrent decoder looks at all of its source instead of one vector that stands for it."""

from jaxtyping import Bool, Float
from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """score_j = v . tanh(W query + U memory_j), and the context is the memory's mean under softmax(scores).

    Source: Bahdanau et al. 2015 (arXiv:1409.0473), appendix A.1.2: W, U, v are `q_proj`, `k_proj`, `score_proj`.
    """

    def __init__(self, query_size: int, memory_size: int, hidden_size: int):
        super().__init__()
        self.q_proj = nn.Linear(query_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(memory_size, hidden_size, bias=False)
        self.score_proj = nn.Linear(hidden_size, 1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "B Q"],
        memory: Float[Tensor, "B S M"],
        *,
        mask: Bool[Tensor, "B S"] | None = None,
        keys: Float[Tensor, "B S A"] | None = None,
    ) -> Float[Tensor, "B M"]:
        """The context of each query. `mask` is True where the memory is real, at one position of a row at least.

        `keys` = k_proj(memory), for a caller who asks often: Bahdanau et al., too, compute it once.
        """
        weights = self.weights(query, memory, mask=mask, keys=keys)
        return (weights[:, None] @ memory).squeeze(1)

    def weights(
        self, query: Tensor, memory: Tensor, *, mask: Tensor | None = None, keys: Tensor | None = None
    ) -> Float[Tensor, "B S"]:
        """The attention weights of that call of `forward`; each row sums to 1."""
        keys = self.k_proj(memory) if keys is None else keys
        scores = self.score_proj((self.q_proj(query)[:, None] + keys).tanh()).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1)
