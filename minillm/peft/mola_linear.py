"""The MoLA layer: several low-rank adapters, the experts, of which a router chooses a few for each token.

Source: Gao et al. 2024 (arXiv:2402.08562). The balance loss is Switch Transformer's (Fedus et al. 2021,
arXiv:2101.03961, equation 4) with top-k instead of top-1.
"""

import math

import torch
from torch import Tensor, nn

from minillm.peft.linears import adapter_dtype, device_of, features
from minillm.peft.lora_linear import rank_problem
from minillm.peft.names import Wrapper, innermost


class Routing:
    """What a router said in the last forward pass. A copy of the layer has none: it is part of that pass's graph."""

    probabilities: Tensor | None = None  # (*batch, N)
    chosen: Tensor | None = None  # (*batch, k) indices

    def __reduce__(self) -> tuple:
        return Routing, ()


class MoLALinear(Wrapper):
    """base(x) + sum over the chosen experts e of w_e (alpha / R) B_e A_e dropout(x), for each token by itself.

    p = softmax(router x) in float32 at least; the `top_k` largest p, divided by their sum, are the w. All experts are
    computed, as one adapter of rank N R, and those not chosen have the weight 0: for a few thin matrices that is faster
    than sorting tokens. A (N, R, Din) and the router (N, Din) start uniform within 1 / sqrt(Din) of 0; B (N, Dout, R)
    is 0, so nothing changes at first. With top_k = 1 (or one expert) w is 1 whatever the router says, so only the
    balance loss teaches it.
    Raises ValueError for a rank that the layer cannot have and for fewer experts than `top_k`.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: int,
        rank: int,
        alpha: float,
        *,
        top_k: int = 2,
        dropout: float = 0.0,
        remember: bool = True,
    ):
        super().__init__()
        layer = innermost(base)
        self.in_features, self.out_features = features(layer)
        if problem := rank_problem(rank, self.in_features, self.out_features) or expert_problem(experts, top_k):
            raise ValueError(problem)
        self.base, self.experts, self.rank, self.top_k = base, experts, rank, top_k
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(self.in_features)  # by hand: kaiming_uniform_ would take R * Din for the fan-in
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.lora_A = nn.Parameter(torch.empty(experts, rank, self.in_features, **where).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(experts, self.out_features, rank, **where))
        self.router = nn.Parameter(torch.empty(experts, self.in_features, **where).uniform_(-bound, bound))
        self.remember = remember  # for the balance loss
        self.routing = Routing()

    def forward(self, x: Tensor) -> Tensor:
        y, gates = self.base(x), self._gates(x)  # (*batch, N)
        a, b = self.lora_A.flatten(0, 1), self.lora_B.transpose(1, 2).flatten(0, 1)  # (N R, Din), (N R, Dout)
        u = self.dropout(x).to(a.dtype) @ a.mT
        u = u.unflatten(-1, (self.experts, self.rank)) * gates.to(u.dtype).unsqueeze(-1)
        return (y + self.scale * (u.flatten(-2) @ b)).to(y.dtype)

    def _gates(self, x: Tensor) -> Tensor:
        """(*batch, N): the weight of each expert for each token, 0 for those not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = torch.softmax(x.to(self.router.dtype) @ self.router.mT, dim=-1)
        top, chosen = probabilities.topk(self.top_k, dim=-1)
        trains = self.training and self.router.requires_grad and torch.is_grad_enabled()
        if self.remember and trains and not _recomputing():
            self.routing.probabilities, self.routing.chosen = probabilities, chosen
        return torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))

    def balance(self, mask: Tensor | None) -> Tensor | None:
        """N * sum_e f_e P_e of the last training pass, which is then forgotten; None if there was none.

        f_e is the share of all choices that fell on expert e, P_e the mean of its probability, both over the real
        tokens: 1 if all experts are used alike, N / k if the same k are always chosen for sure. A layer that
        has seen another shape than `mask` speaks of, such as an encoder beside a decoder, counts all it has seen.
        """
        probabilities, chosen = self.routing.probabilities, self.routing.chosen
        self.routing = Routing()
        if probabilities is None:
            return None
        real = torch.ones(probabilities.shape[:-1], dtype=torch.bool, device=probabilities.device)
        if mask is not None and mask.numel() == real.numel() and (mask.shape == real.shape or real.dim() == 1):
            real = mask.to(real.device).view_as(real)
        weight = real.to(probabilities.dtype)[..., None]
        count = weight.sum().clamp(min=1)
        share = (nn.functional.one_hot(chosen, self.experts).sum(-2) * weight).flatten(0, -2).sum(0)
        mean = (probabilities * weight).flatten(0, -2).sum(0) / count
        return self.experts * (share / (count * self.top_k) * mean).sum()

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}, rank={self.rank}, scale={self.scale:g}"


def _recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as gradient checkpointing does it.

    What it says has been heard before; and to keep it would keep the activations that checkpointing saves.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def expert_problem(experts: int, top_k: int) -> str | None:
    """Why a layer cannot have so many experts, None if it can."""
    return None if 1 <= top_k <= experts else f"top_k={top_k} experts for each token, but it has {experts}"
