"""LoRA on an embedding: the update of row i is column i of A times B, so only the rows looked up are computed."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from minillm.peft.linears import adapter_dtype, device_of
from minillm.peft.lora_linear import rank_problem
from minillm.peft.names import Wrapper, innermost


class LoRAEmbedding(Wrapper):
    """base(tokens) + scale * (B A)^T[tokens], with A (R, V) zero and B (D, R) random.

    That is the other way round than in a LoRALinear: a row gets a gradient as soon as its token occurs. There is no
    dropout. Source: Hu et al. 2021 (arXiv:2106.09685) and its code, which peft follows.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, rslora: bool = False):
        super().__init__()
        layer = innermost(base)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        if problem := rank_problem(rank, self.num_embeddings, self.embedding_dim):
            raise ValueError(problem)
        self.base, self.rank = base, rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, self.num_embeddings, **where))
        self.lora_embedding_B = nn.Parameter(torch.randn(self.embedding_dim, rank, **where))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.base(tokens)
        codes = embedding(tokens, self.lora_embedding_A.t(), self.padding_idx)
        return x + (self.scale * (codes @ self.lora_embedding_B.t())).to(x.dtype)

    @property
    def padding_idx(self) -> int | None:
        return innermost(self.base).padding_idx

    @property
    def weight(self) -> Tensor:
        """The merged matrix (V, D): summed in float32 at least, rounded once to the dtype of the base's."""
        base = self.base.weight
        wide = torch.promote_types(base.dtype, self.lora_embedding_A.dtype)
        update = (self.lora_embedding_B.to(wide) @ self.lora_embedding_A.to(wide)).t()
        return (base.to(wide) + self.scale * update).to(base.dtype)

    def folded(self) -> dict[str, Tensor]:
        """The merged matrix."""
        return {"weight": self.weight}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"
