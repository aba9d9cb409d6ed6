"""Mixed batches of LoRA adapters by our kernel: each row's matrices are read where they are, none is copied."""

import torch
from torch import Tensor

from minillm.ops.lora import cast_as_autocast
from minillm.ops.lora_gather import _check, lora_gather, lora_rows
from minillm.ops.native import below_autograd, wants_grad
from minillm.ops.native_lora import autocast_dtype, slow_on_gpu, update_obstacle

MOST_ROWS = 65535  # of a batch on a GPU: one dimension of a kernel's grid


def _cannot(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *others: Tensor) -> str:
    if any(t.device != x.device for t in others):
        return "the tensors are of different types, or on different devices"
    if x.is_cuda and max(len(x), len(a)) > MOST_ROWS:
        return f"more than {MOST_ROWS} rows or adapters on a GPU"
    return update_obstacle(y, x, a, b)


def _slower(y: Tensor, x: Tensor, *_: Tensor) -> str:
    return slow_on_gpu(x, x.shape[1])


@lora_gather.native(_cannot, _slower)
def _lora_gather(y, x, a, b, rows, scale):
    return _run(y, x, a, b, rows.long().contiguous(), scale.float().contiguous())


@lora_rows.native(_cannot, _slower)
def _lora_rows(y, x, a, b):
    return _run(y, x, a, b, None, None)


def _run(y, x, a, b, rows, scale):
    device = x.device.type
    if autocast_dtype(device):
        x, a, b = cast_as_autocast(x, a, b)
        with torch.autocast(device, enabled=False):
            return _run(y, x, a, b, rows, scale)
    operation = torch.ops.minillm.lora_gather.default
    b = b if b.stride(1) == 1 else b.mT.contiguous().mT  # as a bank has it: Dout side by side
    arguments = (y, x, a, b, rows, None, scale)
    if torch.compiler.is_compiling():
        return operation(*arguments)[0]
    try:
        if wants_grad(y, x, a, b) or (scale is not None and wants_grad(scale)):
            return operation(*arguments)[0]
        return below_autograd(operation, *arguments)[0]
    except RuntimeError:
        if rows is not None:
            _check(rows, len(a))  # the op's own error, if that was the trouble
        raise


def register() -> None:
    """Tell torch the operations' shapes and the gradient."""

    @torch.library.register_fake("minillm::lora_gather")
    def _(y, x, a, b, rows, ranks, scale, stage=0):
        return torch.empty_like(y, memory_format=torch.contiguous_format), u_like(x, a)

    def u_like(x, a):
        return x.new_empty(*x.shape[:2], a.shape[1], dtype=torch.float32)

    @torch.library.register_fake("minillm::lora_gather_backward")
    def _(grad, x, a, b, rows, ranks, scale, u, need_x, need_factors, stage=0):
        some = len(a) if need_factors else 0
        grad_b = b.new_empty(some, b.shape[2], b.shape[1]).mT
        sizes = (x.shape[0] if need_x else 0, *x.shape[1:])
        return x.new_empty(sizes), a.new_empty(some, *a.shape[1:]), grad_b, a.new_empty(some, dtype=torch.float32)

    def keep(ctx, inputs, output):
        _, x, a, b, rows, ranks, scale = inputs[:7]  # torch leaves out what has its default
        ctx.save_for_backward(x, a, b, rows, ranks, scale, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        need_y, need_x, need_a, need_b, _, _, need_scale = ctx.needs_input_grad[:7]
        if grad is None:
            return (None,) * 8
        need_factors = need_a or need_b or need_scale
        wanted = [None] * 4
        if need_x or need_factors:
            adjacent = grad if grad.stride(-1) == 1 else grad.contiguous()
            made = torch.ops.minillm.lora_gather_backward(adjacent, *ctx.saved_tensors, need_x, need_factors)
            needs = (need_x, need_a, need_b, need_scale)
            wanted = [gradient if need else None for gradient, need in zip(made, needs, strict=True)]
        grad_x, grad_a, grad_b, grad_scale = wanted
        return grad if need_y else None, grad_x, grad_a, grad_b, None, None, grad_scale, None

    torch.library.register_autograd("minillm::lora_gather", backward, setup_context=keep)
