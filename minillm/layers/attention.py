"""Multi-head attention: self or cross, with fewer key/value heads if wanted, with a cache if given."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from minillm import ops
from minillm.layers.cache import KVCache

Rotation = tuple[Tensor, Tensor]  # cosines and sines of `ops.rotary_table`


class Attention(nn.Module):
    """Queries from x read from `source` (x itself unless given), each head in its own features.

    `num_kv_heads` = `num_heads` is multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), 1 is multi-query
    (Shazeer 2019, arXiv:1911.02150), between them grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).
    The projections stay separate modules, so that each can be adapted, quantised or frozen by its name.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}; or give head_dim")
        self.head_dim = head_dim or hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.dropout = dropout

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        source: Float[Tensor, "B S0 D"] | None = None,
        mask: Bool[Tensor, "#B #H #T S1"] | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        bias: Float[Tensor, "#B #H #T S1"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend and project back to D features.

        `mask` (True = may see) and `bias` (added to the scores) speak of the newest keys; keys before them, such as
        a learned prefix in the cache, are seen by all. `causal`: a query sees no later position.
        `rotation`: cosines and sines that turn queries and keys. `cache` keeps this call's keys and values.
        """
        q, k, v, mask, bias = self._project(x, source, mask, rotation, bias, cache)
        dropout = self.dropout if self.training else 0.0
        y = ops.attention(q, k, v, mask=mask, causal=causal, bias=bias, dropout=dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def weights(
        self, x: Tensor, *, source=None, mask=None, causal=False, rotation=None, bias=None, cache=None
    ) -> Float[Tensor, "B H T S"]:
        """The attention weights of that call of `forward`, for looking at. A `cache` is filled, as `forward` would."""
        q, k, _, mask, bias = self._project(x, source, mask, rotation, bias, cache)
        return ops.attention_weights(q, k, mask=mask, causal=causal, bias=bias)

    def _project(self, x, source, mask, rotation, bias, cache):
        source = x if source is None else source
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, G, S, K)
        v = self.v_proj(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rotation is not None:
            q, k = ops.rope(q, *rotation), ops.rope(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v)
        if mask is not None and (older := k.shape[2] - mask.shape[-1]):
            mask = pad(mask, (older, 0), value=True)
        if bias is not None and (older := k.shape[2] - bias.shape[-1]):
            bias = pad(bias, (older, 0), value=0.0)
        return q, k, v, mask, bias
