"""RMS normalisation by our kernel where no gradient is wanted: one call instead of six."""

import torch
from torch import Tensor

from minillm.ops.native import below_autograd, wants_grad, why_not
from minillm.ops.norm import rms_norm


def _cannot(x: Tensor, weight: Tensor, eps: float) -> str:
    if not x.is_cpu:
        return f"no kernel for {x.device.type}"
    if not x.is_contiguous():
        return "rows that do not lie side by side in memory: call .contiguous()"
    return why_not(x, weight)


def _slower(x: Tensor, weight: Tensor, eps: float) -> str:
    return "training, where torch keeps less for the backward" if wants_grad(x, weight) else ""


@rms_norm.native(_cannot, _slower)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    operation = torch.ops.minillm.rms_norm.default
    if torch.compiler.is_compiling() or wants_grad(x, weight):
        return operation(x, weight, eps)
    return below_autograd(operation, x, weight, eps)


def register() -> None:
    """Tell torch the operation's shape and gradient, which is `minillm.ops.norm`'s."""

    @torch.library.register_fake("minillm::rms_norm")
    def _(x, weight, eps):
        return torch.empty_like(x)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.eps = inputs[2]

    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide, g = x.float(), (grad * weight).float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        n = wide * inverse
        grad_x = inverse * (g - n * (g * n).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (grad * n).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype), None

    torch.library.register_autograd("minillm::rms_norm", backward, setup_context=keep)
