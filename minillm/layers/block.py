"""The transformer block: sublayers that each read the residual stream and add to it."""

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from minillm.layers.attention import Attention, Rotation
from minillm.layers.cache import KVCache


class Block(nn.Module):
    """Self-attention, cross-attention if given, then an MLP; each with its norm and a residual connection.

    `norm_first=True` is x + f(norm(x)), as in GPT-2 and Llama; False is norm(x + f(x)), as in the original transformer
    and BERT. Source: Vaswani et al. 2017 (arXiv:1706.03762), figure 1; Xiong et al. 2020 (arXiv:2002.04745).
    `norm` makes one norm layer: `lambda: RMSNorm(hidden_size)`.
    """

    def __init__(
        self,
        self_attn: Attention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        cross_attn: Attention | None = None,
        dropout: float = 0.0,
        norm_first: bool = True,
    ):
        super().__init__()
        self.attn_norm, self.self_attn = norm(), self_attn
        if cross_attn is not None:
            self.cross_attn_norm, self.cross_attn = norm(), cross_attn
        else:
            self.cross_attn = None
        self.mlp_norm, self.mlp = norm(), mlp
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        context: Float[Tensor, "B S1 D"] | None = None,
        mask: Bool[Tensor, "#B #H #T S1"] | None = None,
        causal: bool = False,
        window: int = 0,
        rotation: Rotation | None = None,
        bias: Float[Tensor, "#B #H #T S3"] | None = None,
        cache: KVCache | None = None,
        memory: Float[Tensor, "B S2 D"] | None = None,
        memory_mask: Bool[Tensor, "#B #H #T S2"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """`context` is the whole text, which self-attention reads, where x is only some of its positions.

        `memory` is what cross-attention reads, the encoder's output; with a cache only the first call needs it.

        The rest is as in `Attention.forward`.
        """
        if context is not None and self.norm_first:
            context = self.attn_norm(context)
        options = {"mask": mask, "causal": causal, "window": window, "rotation": rotation, "bias": bias, "cache": cache}
        x = self._add(x, self.attn_norm, lambda h: self.self_attn(h, source=context, **options))
        if self.cross_attn is not None:
            read = None if cache is None else cache.memory
            x = self._add(
                x, self.cross_attn_norm, lambda h: self.cross_attn(h, source=memory, mask=memory_mask, cache=read)
            )
        return self._add(x, self.mlp_norm, self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        y = sublayer(norm(x) if self.norm_first else x)
        x = x + (self.dropout(y) if self.training else y)  # a module that does nothing costs 5 microseconds
        return x if self.norm_first else norm(x)
