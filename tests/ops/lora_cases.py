"""What every kernel of low-rank updates must compute: edge cases, and the formula in float64.

Low precision: at most twice the error of the definition in PyTorch's operations in the same types.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minillm import ops
from minillm.ops.dropout import kept

TYPES = {  # of x and y, and of the factors
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 on bfloat16": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One adapter beside a linear layer."""

    rows: tuple[int, ...] = (37,)
    Din: int = 33
    Dout: int = 29
    R: int = 5
    bias: bool = True
    strided: bool = False
    scale: float = 0.75  # alpha / R, and alpha is not R
    seed: int = 2**40 + 12345

    def tensors(self, low, thin, device="cpu") -> tuple[list[Tensor | None], Tensor]:
        """x, weight, bias, a, b, and a gradient of the output."""

        def draw(*shape, dtype=low):
            wide = (*shape[:-1], shape[-1] + 8 * self.strided)
            return torch.randn(wide).to(dtype)[..., : shape[-1]].to(device)

        x, weight, grad = draw(*self.rows, self.Din), draw(self.Dout, self.Din), draw(*self.rows, self.Dout)
        bias = torch.randn(self.Dout).to(device, low) if self.bias else None
        a, b = draw(self.R, self.Din, dtype=thin), draw(self.Dout, self.R, dtype=thin)
        tensors = [x, weight * self.Din**-0.5, bias, a * self.Din**-0.5, b]
        return [t if t is None else t.detach().requires_grad_() for t in tensors], grad

    def exact(self, tensors, dropout: float) -> Tensor:
        """The formula; tensors in float64, on the CPU."""
        x, weight, bias, a, b = tensors
        flat = x.reshape(-1, self.Din)
        keep = kept(*flat.shape, dropout, self.seed, "cpu").double() / (1 - round(dropout * 2**24) / 2**24)
        return F.linear(x, weight, bias) + self.scale * ((flat * keep).view(x.shape) @ a.mT) @ b.mT


CASES = {
    "odd sizes": Case(),
    "whole registers": Case((70,), 136, 72, 16),
    "rank 1": Case((9,), 20, 50, 1),
    "rank 64": Case((19,), 130, 66, 64, bias=False),
    "rank 20": Case((50,), 64, 264, 20),
    "one row": Case((1,), 40, 24, 4),
    "one row of a batch": Case((3, 1), 40, 24, 4),
    "batch": Case((2, 3, 11), 24, 40, 8, bias=False),
    "strided": Case((2, 17), 40, 24, 8, strided=True),
    "many rows": Case((300,), 64, 48, 8),
    "no row": Case((2, 0), 7, 5, 3),
    "one number": Case((1,), 1, 1, 1),
}
DROPOUTS = (0.0, 0.05, 0.5)


def close(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """The largest error is at most twice that of PyTorch's operations, or some roundings of the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == truth.shape
    if truth.numel():
        off, usual = ((t.detach().double().cpu() - truth).abs().max().item() for t in (ours, theirs))
        roundings = 8 if ours.dtype == torch.float32 else 1  # one sum by luck exact is no measure for another order
        allowed = 2 * usual + roundings * torch.finfo(ours.dtype).eps * (1 + truth.abs().max().item())
        assert off <= allowed, f"error {off:.2e}, allowed {allowed:.2e}"


def in_float64(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same numbers on the CPU, as leaves of their own, so that their gradients are not rounded."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().cpu().double().requires_grad_() for t in tensors
    ]


def results(y: Tensor, tensors: list, grad: Tensor) -> tuple[Tensor, ...]:
    return y, *torch.autograd.grad(y, [t for t in tensors if t is not None], grad.to(y.device, y.dtype))


def check_linear(case: Case, types, dropout: float, device="cpu", backend="native") -> None:
    """`lora_linear` and `lora`, and all their gradients."""
    tensors, grad = case.tensors(*types, device)
    x, weight, bias, *factors = tensors
    rest = (case.scale, dropout, case.seed)

    def linear(backend):
        with ops.use_backend(backend):
            return results(ops.lora_linear(*tensors, *rest), tensors, grad)

    def beside(backend):
        with ops.use_backend(backend):
            return results(ops.lora(F.linear(x, weight, bias), x, *factors, *rest), tensors, grad)

    precise = in_float64(tensors)
    truth = results(case.exact(precise, dropout), precise, grad.cpu())
    theirs = linear("reference")
    for ours in (linear(backend), beside(backend)):
        for one, two, exact in zip(ours, theirs, truth, strict=True):
            close(one, two, exact)


@dataclass(frozen=True)
class Mixed:
    """A batch of rows with adapters of different ranks; -1: a row without."""

    rows: tuple[int, ...]
    T: int
    Din: int
    Dout: int
    ranks: tuple[int, ...] = (32, 1, 5, 2)

    def tensors(self, low, thin, device="cpu") -> tuple[list[Tensor], Tensor]:
        """y, x, a, b, rows, scale as `ops.lora_gather` wants them, and a gradient of the output."""
        B = len(self.rows)
        y, x, grad = (torch.randn(B, self.T, width).to(device, low) for width in (self.Dout, self.Din, self.Dout))
        a = pad_sequence([torch.randn(rank, self.Din) for rank in self.ranks], batch_first=True) * self.Din**-0.5
        b = pad_sequence([torch.randn(rank, self.Dout) for rank in self.ranks], batch_first=True)
        scale = torch.tensor([2.5, -0.5, 1.0, 3.0][: len(self.ranks)])  # all of them exact in bfloat16
        a, b, scale = (t.to(device, thin) for t in (a, b, scale))
        rows = torch.tensor(self.rows, dtype=torch.long, device=device)
        y, x, a, b, scale = (t.requires_grad_() for t in (y, x, a, b.mT, scale))
        return [y, x, a, b, rows, scale], grad

    def exact(self, tensors) -> Tensor:
        """The formula; tensors in float64, on the CPU."""
        y, x, a, b, _, scale = tensors
        rows = [y[i] + (x[i] @ (scale[n] * (b[n] @ a[n])).mT if n >= 0 else 0) for i, n in enumerate(self.rows)]
        return torch.stack(rows) if rows else y * 1.0


MIXED = {
    "decoding": Mixed((2, 0, -1, 3, 1, 2), 1, 40, 264),
    "odd sizes": Mixed((3, 0, 3, -1), 1, 37, 29),
    "a few positions": Mixed((1, -1, 0), 4, 64, 48),
    "prompts": Mixed((1, -1, 0, 1), 35, 72, 136, ranks=(5, 33)),
    "prompts of odd sizes": Mixed((1, -1, 0), 35, 70, 129, ranks=(5, 33)),
    "none at all": Mixed((-1, -1), 3, 12, 7),
    "no row": Mixed((), 3, 12, 7),
}


def check_mixed(case: Mixed, types, device="cpu", backend="native") -> None:
    tensors, grad = case.tensors(*types, device)

    def run(backend):
        with ops.use_backend(backend):
            return mixed_results(ops.lora_gather(*tensors), tensors, grad)

    precise = in_float64(tensors)
    truth = mixed_results(case.exact(precise), precise, grad.cpu())
    for one, two, exact in zip(run(backend), run("torch"), truth, strict=True):
        close(one, two, exact)


def mixed_results(y: Tensor, tensors: list, grad: Tensor) -> tuple[Tensor, ...]:
    wanted = [t for t in tensors if t.is_floating_point()]
    return y, *torch.autograd.grad(y, wanted, grad.to(y.dtype), allow_unused=True, materialize_grads=True)
