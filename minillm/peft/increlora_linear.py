"""The IncreLoRA layer: a low-rank adapter with room for more components than speak.

Source: Zhang et al. 2023 (arXiv:2308.12043). The update is s B diag(E) A with s = alpha / rank: a sum of `rank`
components, each a row of A, a number of E and a column of B. The published code divides by rank + 1e-5; ours is exactly
the LoRA that it is saved as. Either way a new component makes all older ones smaller, by rank / (rank + 1).

There is room for `max_rank` components from the start, and a count says how many of them speak. So no parameter ever
changes its shape: optimizer, checkpoints, DDP and early stopping need not know that anything grows.
"""

import math

import torch
from torch import Tensor, nn

from minillm.ops import lora
from minillm.peft.linears import adapter_dtype, device_of, features, is_conv1d
from minillm.peft.lora_linear import rank_problem
from minillm.peft.names import Wrapper, innermost

START = 1e-5  # a new component's E; too small to be heard, and Adam makes steps of full size from its gradients
STD = 0.02  # of A and B at the start


class IncreLoRALinear(Wrapper):
    """base(x) + s B diag(E) A dropout(x) over the components that speak; E = 0 at first, so nothing changes.

    `extent` holds two counts: components below the first speak; those below the second learn ("advance learning"). The
    ones between them, the reserve, have gradients as if they spoke with E = 1e-5, but add nothing to the output (in the
    published code they add that little), so dropping them changes nothing. The rest waits, with gradients of 0.
    """

    extent: Tensor

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, max_rank: int, reserve: int = 1, dropout: float = 0.0
    ):
        super().__init__()
        layer = innermost(base)
        self.in_features, self.out_features = features(layer)
        for size in (rank, max_rank):
            if problem := rank_problem(size, self.in_features, self.out_features):
                raise ValueError(problem)
        self.base, self.alpha, self.max_rank, self.reserve = base, alpha, max_rank, reserve
        self.dropout = nn.Dropout(dropout)
        self.transposed = is_conv1d(layer)
        where = {"dtype": adapter_dtype(layer), "device": device_of(layer)}
        self.lora_A = nn.Parameter(torch.empty(max_rank, self.in_features, **where).normal_(std=STD))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, max_rank, **where).normal_(std=STD))
        self.lora_E = nn.Parameter(torch.full((max_rank,), START, **where))
        with torch.no_grad():
            self.lora_E[:rank] = 0.0
        self.register_buffer("extent", torch.tensor([rank, min(rank + reserve, max_rank)], device=where["device"]))
        self.watched = False  # whether backward passes measure the importance
        self.importance: Tensor | float = 0.0  # measured since it was last set to 0

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base(x), self.dropout(x)
        y = lora(y, x, self.components(), self.lora_B, 1.0)
        if self.training and torch.is_grad_enabled():
            y = y + self._silent(x.detach()).to(y.dtype)
            if self.watched:
                y = _Watch.apply(y, x, self)
        return y

    def components(self) -> Tensor:
        """s diag(E) A (max_rank, Din), with zeros for components that do not speak."""
        speaks = torch.arange(self.max_rank, device=self.extent.device) < self.extent[0]
        return (self.lora_E * speaks * self._scale())[:, None] * self.lora_A

    def _scale(self) -> Tensor:
        return self.alpha / self.extent[0].to(self.lora_A.dtype)

    def _silent(self, x: Tensor) -> Tensor:
        """Exactly 0, with the gradients for the reserve's A and B that it would have if it spoke with E = 1e-5."""
        rows = self.extent[0] + torch.arange(self.reserve, device=self.extent.device)
        weight = START * (rows < self.extent[1]) * self._scale()
        rows = rows.clamp(max=self.max_rank - 1)
        a = weight[:, None] * self.lora_A.index_select(0, rows)
        update = (x.to(a.dtype) @ a.mT) @ self.lora_B.index_select(1, rows).mT
        return update - update.detach()

    @torch.no_grad()
    def measure(self, x: Tensor, grad: Tensor) -> None:
        """Add sum |dW * dL/d(dW)| / sqrt(numel) of one backward pass to `importance`, where dL/d(dW) = grad^T x.

        Over several passes (accumulation) this sums the absolute values of each, so no gradient of the weight's size
        has to be kept between them: an upper bound of what the whole step would give.
        """
        x, grad = (t.reshape(-1, t.shape[-1]).to(self.lora_A.dtype) for t in (x, grad))
        update = self.lora_B @ self.components()
        self.importance = self.importance + (update * (grad.mT @ x)).abs().sum() / math.sqrt(update.numel())

    def orthogonality(self) -> Tensor:
        """||A A^T - I|| and ||B^T B - I|| (2,), Frobenius norms over all components that speak or learn."""
        learns = torch.arange(self.max_rank, device=self.extent.device) < self.extent[1]
        inside = learns[:, None] & learns
        with torch.autocast(self.lora_A.device.type, enabled=False):
            products = torch.stack([self.lora_A @ self.lora_A.mT, self.lora_B.mT @ self.lora_B])
        eye = torch.eye(self.max_rank, dtype=products.dtype, device=products.device)
        return torch.where(inside, products - eye, 0.0).flatten(1).norm(dim=1)

    @property
    def weight(self) -> Tensor:
        """The merged weight W + s B diag(E) A: summed in float32 at least, rounded once to the dtype of W."""
        base = self.base.weight
        wide = torch.promote_types(base.dtype, self.lora_A.dtype)
        update = self.lora_B.to(wide) @ self.components().to(wide)
        return (base.to(wide) + (update.t() if self.transposed else update)).to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def folded(self) -> dict[str, Tensor]:
        """The merged weight."""
        return {"weight": self.weight}

    def extra_repr(self) -> str:
        return f"rank={int(self.extent[0])}, max_rank={self.max_rank}, alpha={self.alpha:g}"


class _Watch(torch.autograd.Function):
    """y itself; its backward shows the layer its input x and the gradient of y."""

    @staticmethod
    def forward(ctx, y, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        ctx.layer.measure(*ctx.saved_tensors, grad)
        return grad, None, None
