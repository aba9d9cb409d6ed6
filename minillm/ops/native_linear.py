"""Linear layers by our kernel where there are at most 4 rows, with and without a low-rank update."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.ops.linear import ROWS, SMALL, linear
from minillm.ops.lora import lora_linear
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


def _cannot_lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> str:
    if reason := _cannot(x, weight, bias):
        return reason
    return factors_obstacle(x, a, b)


def factors_obstacle(x: Tensor, a: Tensor, b: Tensor) -> str:
    """What keeps our kernels from using the low-rank factors a and b on x; "" if nothing."""
    if reason := why_not(a) or (b.dtype != a.dtype and "factors of different types"):
        return reason
    return "bfloat16 factors on a float32 base" if a.dtype != x.dtype and x.dtype == torch.float32 else ""


def _slower_lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> str:
    return _slow(x, weight, a, b) if bias is None else _slow(x, weight, a, b, bias)


@lora_linear.native(_cannot_lora, _slower_lora)
def _lora_linear(x, weight, bias, a, b, scale):
    if not 0 < rows_of(x) <= ROWS or a.shape[0] == 0:
        return lora_linear.implementations["torch"](x, weight, bias, a, b, scale)
    operation, b = torch.ops.minillm.lora_linear.default, b if b.stride(-1) == 1 else b.contiguous()
    arguments = (_regular(x), weight, bias, a, b, scale)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operation(*arguments)
    return below_autograd(operation, *arguments)


def register() -> None:
    """Tell torch the operations' shapes and gradients."""

    @torch.library.register_fake("minillm::linear")
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("minillm::lora_linear")
    def _(x, weight, bias, a, b, scale):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.scale = inputs[5] if len(inputs) > 5 else None

    def backward(ctx, grad):
        x, weight, _, *factors = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        g, rows = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = g @ weight if need_x else None
        base = [grad_x, g.mT @ rows if need_weight else None, g.sum(0) if need_bias else None]
        if not factors:
            return grad_x if grad_x is None else grad_x.view(x.shape), *base[1:]
        a, b = factors
        g, rows = g.to(a.dtype), rows.to(a.dtype)
        v = ctx.scale * (g @ b)
        if need_x:
            base[0] = (grad_x + v @ a).to(x.dtype).view(x.shape)
        return *base, v.mT @ rows, ctx.scale * (g.mT @ (rows @ a.mT)), None

    torch.library.register_autograd("minillm::linear", backward, setup_context=keep)
    torch.library.register_autograd("minillm::lora_linear", backward, setup_context=keep)
