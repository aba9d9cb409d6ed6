"""Linear layers by our kernel where there are at most 4 rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.ops.linear import ROWS, SMALL, linear
from minillm.ops.native import below_autograd, wants_grad, why_not


def rows_of(x: Tensor) -> int:
    """How many rows of features x has."""
    return x.numel() // (x.shape[-1] or 1)


def _cannot(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    if (
        bias is None
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous()
        and weight.is_contiguous()
        and weight.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    ):
        return ""  # as `why_not_linear` would find, in a third of its time, which counts for a small layer
    return why_not_linear(x, weight) if bias is None else why_not_linear(x, weight, bias)


def why_not_linear(*tensors: Tensor) -> str:
    """What keeps the kernels of linear layers from taking these tensors; "" if nothing."""
    if reason := why_not(*tensors):
        return reason
    autocast = torch.is_autocast_enabled(tensors[0].device.type)
    return "autocast changes types, which is the library's business" if autocast else ""


def _slower(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    if weight.numel() < (small := SMALL.get(x.device.type, 0)):
        return f"a small weight, of less than {small} numbers"
    return _slow(x, weight) if bias is None else _slow(x, weight, bias)


def _slow(x: Tensor, *others: Tensor) -> str:
    if rows_of(x) > ROWS:
        return f"more than {ROWS} rows, which the library multiplies as fast"
    return "training, where the backward takes most of the time" if wants_grad(x, *others) else ""


@linear.native(_cannot, _slower)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not 0 < rows_of(x) <= ROWS:
        return F.linear(x, weight, bias)
    operation = torch.ops.minillm.linear.default
    x = _regular(x)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operation(x, weight, bias)
    return below_autograd(operation, x, weight, bias)


def _regular(x: Tensor) -> Tensor:
    """x with its rows at one distance from each other."""
    return x if x.dim() <= 2 or x.is_contiguous() else x.contiguous()


def register() -> None:
    """Tell torch the operations' shapes and gradients."""

    @torch.library.register_fake("minillm::linear")
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def keep(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        g, rows = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            (g @ weight).view(x.shape) if need_x else None,
            g.mT @ rows if need_weight else None,
            g.sum(0) if need_bias else None,
        )

    torch.library.register_autograd("minillm::linear", backward, setup_context=keep)
