"""A linear layer with a low-rank update: the library multiplies the frozen weight, our kernels add the update.

For at most 4 rows without gradients, as in generation on a processor, the kernel that reads the weight does it all.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from minillm.ops.dropout import check_dropout
from minillm.ops.linear import ROWS
from minillm.ops.lora import cast_as_autocast, lora_linear
from minillm.ops.native import below_autograd, wants_grad, why_not
from minillm.ops.native_linear import _cannot, _regular, _slow, rows_of
from minillm.ops.native_lora import adjacent, autocast_dtype, factors_obstacle, seed_tensor, slow, update


def _cannot_linear(x, weight, bias, a, b, scale, dropout=0.0, seed=None) -> str:
    device = x.device.type
    if low := autocast_dtype(device):
        if low != torch.bfloat16:
            return f"autocast to {str(low).removeprefix('torch.')}, where kernels know float32 and bfloat16"
        return why_not(x) or why_not(weight) or factors_obstacle(x, a, b, low)
    if device == "cpu":
        return _cannot(x, weight, bias) or factors_obstacle(x, a, b)
    return (why_not(x, weight) if bias is None else why_not(x, weight, bias)) or factors_obstacle(x, a, b)


def _slower_linear(x, weight, bias, a, b, scale, dropout=0.0, seed=None) -> str:
    if x.is_cuda or dropout or (x.dtype == torch.bfloat16 and rows_of(x) > ROWS):
        return slow(x, a, dropout)
    return _slow(x, weight, a, b) if bias is None else _slow(x, weight, a, b, bias)


@lora_linear.native(_cannot_linear, _slower_linear)
def _lora_linear(x, weight, bias, a, b, scale, dropout=0.0, seed=None):
    check_dropout(dropout, seed)
    device = x.device.type
    if autocast_dtype(device):
        tensors = cast_as_autocast(x, weight, bias, a, b)
        with torch.autocast(device, enabled=False):
            return _lora_linear(*tensors, scale, dropout, seed)
    if device == "cpu" and not dropout and 0 < rows_of(x) <= ROWS and a.shape[0]:
        return _few(x, weight, bias, a, b, scale)
    rows, seed = x.reshape(-1, x.shape[-1]), seed_tensor(dropout, seed)
    if wants_grad(*(t for t in (x, weight, bias, a, b) if t is not None)):
        y = _LoRALinear.apply(rows, weight, bias, a, b, scale, dropout, seed)
    else:
        y = update(F.linear(rows, weight, bias), rows, a, b, scale, dropout, seed)
    return y.view(*x.shape[:-1], y.shape[-1])


def _few(x, weight, bias, a, b, scale):
    """At most 4 rows: the update is a part of the kernel that reads the weight."""
    operation, arguments = torch.ops.minillm.lora_linear.default, (_regular(x), weight, bias, a, adjacent(b), scale)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operation(*arguments)
    return below_autograd(operation, *arguments)


class _LoRALinear(torch.autograd.Function):
    """`lora_linear` on rows x (N, Din). The base's gradient of x is made first, and that of the update added to it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias, a, b, scale, dropout, seed):
        x, a, b = map(adjacent, (x, a, b))
        y, u = torch.ops.minillm.lora.default(F.linear(x, weight, bias), x, a, b, scale, dropout, seed)
        need_x, need_weight, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.rest = scale, dropout
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            *((a, b, u, seed) if need_x or need_a or need_b else 4 * [None]),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad):
        x, weight, a, b, u, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_factors, _, _, _ = ctx.needs_input_grad
        grads = 3 * [None]
        if need_x or any(need_factors):
            base = grad @ weight if need_x else None
            given = adjacent(grad)
            rows = x if x is not None else base if need_x else given.new_empty(len(given), a.shape[1])
            needs = (need_x, *need_factors)
            made = torch.ops.minillm.lora_backward(given, base, rows, a, b, u, *ctx.rest, seed, *needs)
            grads = [gradient if need else None for gradient, need in zip(made, needs, strict=True)]
        grad_weight = grad.t() @ x if need_weight else None
        return grads[0], grad_weight, grad.sum(0) if need_bias else None, *grads[1:], None, None, None


def register() -> None:
    """Tell torch the shape and the gradient of the operation for few rows."""

    @torch.library.register_fake("minillm::lora_linear")
    def _(x, weight, bias, a, b, scale):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def keep(ctx, inputs, output):
        x, weight, _, a, b, ctx.scale = inputs
        ctx.save_for_backward(x, weight, a, b)

    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        g, rows = grad.flatten(0, -2), x.flatten(0, -2)
        grad_weight, grad_bias = g.mT @ rows if need_weight else None, g.sum(0) if need_bias else None
        g, rows = g.to(a.dtype), rows.to(a.dtype)
        v = ctx.scale * (g @ b)
        grad_x = (g @ weight.to(a.dtype) + v @ a).to(x.dtype).view(x.shape) if need_x else None
        return grad_x, grad_weight, grad_bias, v.mT @ rows, ctx.scale * (g.mT @ (rows @ a.mT)), None

    torch.library.register_autograd("minillm::lora_linear", backward, setup_context=keep)
