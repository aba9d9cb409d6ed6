"""The language-model head and its loss in one step.

A head of V words turns N hidden states into N x V logits: for 2048 tokens and 8192 words 64 MiB, several times over in
the backward pass, more than all the rest of a small model. But the loss needs each row of logits only once, and the
gradient of a row follows from the same softmax. So the torch implementation walks over a few rows at a time and leaves
nothing behind but the loss and its gradients.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.ops.registry import Op

IGNORE = -100  # a target, or label, that does not count; the value PyTorch and the Hub use


@Op
def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    chunk: int = 256,
) -> Float[Tensor, ""]:
    """Sum over the rows of -log softmax(hidden weight^T + bias)[target], in float32 (float64 for float64 inputs).

    A row whose target is -100 adds nothing; divide by the number of the others for the mean. The products run in the
    inputs' dtype (autocast's, where it is on), the softmax and the sums in float32.
    `chunk` is the number of rows whose logits exist at once in the torch implementation: a (chunk, V) buffer.
    """
    _check(hidden, weight, targets, chunk)
    logits = F.linear(hidden, weight, bias)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return -log_p[rows, targets[rows]].sum()


@linear_cross_entropy.implementation("torch")
def _linear_cross_entropy_torch(hidden, weight, targets, *, bias=None, chunk=256):
    """In chunks of rows, with the gradients made in the same pass; see the head of this file."""
    _check(hidden, weight, targets, chunk)
    if not torch.is_grad_enabled():
        hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> None:
    wrong, vocab_size = [], len(weight)
    if targets.shape != hidden.shape[:1]:
        wrong.append(f"{tuple(targets.shape)} targets for {tuple(hidden.shape)} hidden states: one per row is needed")
    outside = targets[(targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))]
    if outside.numel():
        examples = ", ".join(map(str, outside.unique()[:5].tolist()))
        wrong.append(
            f"{outside.numel()} targets outside the vocabulary of {vocab_size} (such as {examples}): "
            f"ids run from 0 to {vocab_size - 1}, and {IGNORE} marks a target that does not count"
        )
    if chunk < 1:
        wrong.append(f"chunk={chunk}: at least one row at a time")
    if wrong:
        raise ValueError("linear_cross_entropy: " + "; ".join(wrong))


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products, and the one, float32 at least, of the softmax and of everything summed."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return dtype, torch.promote_types(dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax - onehot(target), so the gradients need no second look at the logits.

    The backward pass gives the gradients of the forward pass away, scaled in place. A second one through the same graph
    has to make them again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk, ctx.dtypes = chunk, _dtypes(hidden, weight)
        loss, ctx.grads = _walk(hidden, weight, bias, targets, chunk, ctx.dtypes, ctx.needs_input_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _walk(*ctx.saved_tensors, ctx.chunk, ctx.dtypes, ctx.needs_input_grad)
        scaled = (None if grad is None else grad.mul_(grad_loss) for grad in grads)
        return *scaled, None, None  # autograd casts each to the dtype of its input


def _walk(hidden, weight, bias, targets, chunk, dtypes, needed) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and its gradients for the three inputs, as far as they are needed."""
    dtype, wide = dtypes
    inputs = zip((hidden, weight, bias), needed, strict=False)
    grads = [torch.zeros_like(x, dtype=wide) if need else None for x, need in inputs]
    loss = hidden.new_zeros((), dtype=wide)
    rows = (targets != IGNORE).nonzero().squeeze(1)
    buffer = hidden.new_empty((min(chunk, len(rows)), len(weight)), dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen already
        weight = weight.to(dtype)
        for some in rows.split(chunk):
            states, target = hidden[some].to(dtype), targets[some, None]
            logits = torch.mm(states, weight.T, out=buffer[: len(some)]).to(wide)
            if bias is not None:
                logits += bias
            largest, picked = logits.amax(-1, keepdim=True), logits.gather(1, target)
            p = torch.softmax(logits, -1, out=logits)
            normaliser = largest - p.amax(-1, keepdim=True).log()  # as max p = exp(largest) / sum of exp(logits)
            loss += (normaliser - picked).sum()
            if any(needed):
                grad = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                _add_gradients(grad, states, weight, some, *grads)
    return loss, grads


def _add_gradients(grad, states, weight, rows, grad_hidden, grad_weight, grad_bias) -> None:
    """Carry `grad`, the gradient of some rows' logits, on to those of the three inputs that need it."""
    if grad_bias is not None:
        grad_bias += grad.sum(0)
    grad = grad.to(weight.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = torch.mm(grad, weight).to(grad_hidden.dtype)
    if grad_weight is not None and grad_weight.dtype == grad.dtype:
        grad_weight.addmm_(grad.T, states)
    elif grad_weight is not None:
        grad_weight += grad.T @ states  # the product in half precision, the sum over chunks not
