"""One adapter's low-rank update by our kernels, beside any layer: dropout is computed again in the backward pass.

native_lora_linear.py is the same around a plain linear layer, native_lora_gather.py many adapters in one batch.
"""

import torch
from torch import Tensor

from minillm.ops.dropout import check_dropout
from minillm.ops.lora import cast_as_autocast, lora
from minillm.ops.native import below_autograd, wants_grad, why_not
from minillm.ops.native_linear import rows_of

FEW = 16  # rows of one text up to which the GPU's kernel for float32 reads 16 bytes at a time (lora_gather.cu)


def factors_obstacle(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> str:
    """What keeps our kernels from using the low-rank factors a and b on x, where it is cast to dtype; "" if nothing."""
    if reason := why_not(a):
        return reason
    if b.dtype != a.dtype:
        return "factors of different types"
    if a.device != x.device or b.device != x.device:
        return "the tensors are of different types, or on different devices"
    if x.is_cuda and a.shape[-2] == 0:
        return "an adapter of rank 0"
    return "bfloat16 factors on a float32 base" if a.dtype != x.dtype == torch.float32 and not dtype else ""


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def slow_on_gpu(x: Tensor, rows: int, dropout: float = 0.0) -> str:
    """Why the library is better for a text of so many rows, where x is on a GPU; "" if it is not."""
    if x.is_cuda and x.dtype == torch.float32 and rows > FEW and not dropout and not autocast_dtype("cuda"):
        return "float32 rows without dropout on a GPU: predicted slower than the library's products, not measured yet"
    return ""


def slow(x: Tensor, a: Tensor, dropout: float) -> str:
    """Why the library is better for an update of x by the factor a; "" if it is not."""
    if x.is_cuda:
        return slow_on_gpu(x, rows_of(x), dropout)
    least = 2**13 if dropout else 2**16
    if x.numel() < least:
        return f"fewer than {least} numbers, where a call of ours costs more than it saves"
    return "" if dropout or a.shape[0] <= 32 else "a rank above 32, which the library multiplies as fast"


def update_obstacle(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *_, **__) -> str:
    """What keeps our kernels from adding to y an update of x by the factors a and b; "" if nothing."""
    low = autocast_dtype(x.device.type)
    if low:
        if low != torch.bfloat16 or y.dtype != low:
            return f"autocast to {str(low).removeprefix('torch.')} of a layer that returns {str(y.dtype)[6:]}"
        return why_not(y) or why_not(x) or factors_obstacle(x, a, b, low)
    return why_not(x, y) or factors_obstacle(x, a, b)


def _slower(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, seed=None) -> str:
    return slow(x, a, dropout)


@lora.native(update_obstacle, _slower)
def _lora(y, x, a, b, scale, dropout=0.0, seed=None):
    check_dropout(dropout, seed)
    device = x.device.type
    if autocast_dtype(device):
        x, a, b = cast_as_autocast(x, a, b)
        with torch.autocast(device, enabled=False):
            return _lora(y, x, a, b, scale, dropout, seed)
    rows_of_y, rows_of_x = (t.reshape(-1, t.shape[-1]) for t in (y, x))
    return update(rows_of_y, rows_of_x, a, b, scale, dropout, seed_tensor(dropout, seed)).view(y.shape)


def update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *rest) -> Tensor:
    """y (M, Dout) and the update of x (M, Din)."""
    arguments = (*map(adjacent, (y, x, a, b)), *rest)
    operation = torch.ops.minillm.lora.default
    if torch.compiler.is_compiling() or wants_grad(y, x, a, b):
        return operation(*arguments)[0]
    return below_autograd(operation, *arguments)[0]


def adjacent(x: Tensor) -> Tensor:
    """x with its features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def seed_tensor(dropout: float, seed: Tensor | int | None) -> Tensor | None:
    """The seed as the operations want it: an int64 on the CPU, or None where nothing is dropped."""
    return torch.as_tensor(seed) if dropout else None


def register() -> None:
    """Tell torch the operations' shapes and gradients."""

    @torch.library.register_fake("minillm::lora")
    def _(y, x, a, b, scale, dropout, seed, stage=0):
        return y.new_empty(y.shape), x.new_empty(len(x), len(a), dtype=torch.float32)

    @torch.library.register_fake("minillm::lora_backward")
    def _(grad, base, x, a, b, u, scale, dropout, seed, need_x, need_a, need_b, stage=0):
        wanted = ((x, need_x), (a, need_a), (b, need_b))
        return tuple(t.new_empty(len(t) if need else 0, t.shape[1]) for t, need in wanted)

    def keep(ctx, inputs, output):
        _, x, a, b, *ctx.rest, seed = inputs[:7]  # torch leaves out what has its default
        ctx.save_for_backward(x, a, b, output[1], seed)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        need_y, *needs = ctx.needs_input_grad[:4]
        made = 3 * [None]
        if grad is not None and any(needs):
            x, a, b, u, seed = ctx.saved_tensors
            made = torch.ops.minillm.lora_backward(adjacent(grad), None, x, a, b, u, *ctx.rest, seed, *needs)
        wanted = [gradient if need else None for gradient, need in zip(made, needs, strict=True)]
        return grad if need_y else None, *wanted, None, None, None, None

    torch.library.register_autograd("minillm::lora", backward, setup_context=keep)
