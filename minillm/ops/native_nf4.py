"""Weights in 4 bits by our kernels: NF4 made in one pass, numbers made of codes, and products without a copy in floats.

Weights in whole numbers (int4.py) are the same to the kernels: they have another code book, and a zero to each scale.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from minillm.ops.int4 import Int4Tensor, int4_dequantize
from minillm.ops.native import below_autograd, wants_grad
from minillm.ops.native_linear import _regular, rows_of, why_not_linear
from minillm.ops.quantize import NF4, QuantTensor, nf4_dequantize, nf4_quantize, pairs
from minillm.ops.quantized import quantized_linear

Weight = QuantTensor | Int4Tensor
ROWS = {torch.float32: 512, torch.bfloat16: 64}  # for more, a library's product of the numbers is as fast
GPU_ROWS, GPU_CODES = 8, 32  # the GPU's fast kernel: up to so many rows, whole sets of so many codes (nf4_linear.cu)


def _cannot(x: Tensor, weight: Weight, bias: Tensor | None) -> str:
    if len(weight.shape) != 2:
        return "a weight that is no matrix"
    if weight.codes.device != x.device:
        return "the tensors are on different devices"
    return why_not_linear(x)


def _few(x: Tensor, weight: Weight) -> bool:
    """Whether the rows of x are few enough for multiplying codes to be faster than making numbers of them first."""
    if x.is_cuda:
        block = 2 * weight.codes.shape[1]
        return rows_of(x) <= GPU_ROWS and x.shape[-1] % GPU_CODES == 0 and block % GPU_CODES == 0
    return rows_of(x) <= ROWS[x.dtype]


@quantized_linear.native(_cannot)
def _quantized_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if not _few(x, weight):
        return _DenseLinear.apply(x, weight, bias) if wants_grad(x) else F.linear(x, dequantize(weight, x.dtype), bias)
    bias = None if bias is None else bias.contiguous()
    if type(weight) is QuantTensor:
        operation, arguments = torch.ops.minillm.nf4_linear.default, (*weight[:6], bias, weight.shape[0])
    else:
        operation, arguments = torch.ops.minillm.int4_linear.default, (*weight[:4], bias)
    if torch.compiler.is_compiling() or wants_grad(x) or (bias is not None and wants_grad(bias)):
        return operation(_regular(x), *arguments)
    return below_autograd(operation, _regular(x), *arguments)


class _DenseLinear(torch.autograd.Function):
    """The product by the library, of numbers that are made again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, dequantize(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad):
        grad_x = grad @ dequantize(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The numbers of a weight in 4 bits."""
    if type(weight) is Int4Tensor:
        return torch.ops.minillm.int4_dequantize(*weight[:4], weight.shape[1], dtype)
    count = torch.Size(weight.shape).numel()
    return torch.ops.minillm.nf4_dequantize(*weight[:6], 1, count, dtype).view(weight.shape)


def _cannot_dequantize(weight: Weight, dtype: torch.dtype) -> str:
    return why_not_linear(weight.book) or ("" if dtype in ROWS else "numbers other than float32 and bfloat16")


nf4_dequantize.native(_cannot_dequantize)(dequantize)
int4_dequantize.native(_cannot_dequantize)(dequantize)


def _cannot_quantize(weight: Tensor, block: int) -> str:
    return why_not_linear(weight.new_empty(1))  # however the weight lies: it is copied if need be


@nf4_quantize.native(_cannot_quantize)
def _nf4_quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return torch.ops.minillm.nf4_quantize(weight.contiguous(), pairs(NF4, weight.device), block)


def register() -> None:
    """Tell torch the operations' shapes and gradients."""
    kernels = torch.ops.minillm

    @torch.library.register_fake("minillm::nf4_quantize")
    def _(weight, book, block):
        blocks = -(-weight.numel() // block)
        codes = weight.new_empty(blocks, block // 2, dtype=torch.uint8)
        return codes, weight.new_empty(blocks, dtype=torch.float32)

    @torch.library.register_fake("minillm::nf4_dequantize")
    def _(codes, absmax, absmax2, offset, book, book8, Dout, Din, dtype):
        return codes.new_empty(Dout, Din, dtype=dtype)

    @torch.library.register_fake("minillm::int4_dequantize")
    def _(codes, scale, zero, book, Din, dtype):
        return codes.new_empty(len(scale), Din, dtype=dtype)

    @torch.library.register_fake("minillm::nf4_linear")
    def _(x, codes, absmax, absmax2, offset, book, book8, bias, Dout):
        return x.new_empty(*x.shape[:-1], Dout)

    @torch.library.register_fake("minillm::int4_linear")
    def _(x, codes, scale, zero, book, bias):
        return x.new_empty(*x.shape[:-1], len(scale))

    def keep_nf4(ctx, inputs, output):
        x, *weight, _, Dout = inputs
        ctx.numbers = partial(kernels.nf4_dequantize, *weight, Dout, x.shape[-1])

    def keep_int4(ctx, inputs, output):
        x, *weight, _ = inputs
        ctx.numbers = partial(kernels.int4_dequantize, *weight, x.shape[-1])

    def gradients(ctx, grad, bias):  # `bias`: the place of it among the arguments
        grads = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            grads[0] = grad @ ctx.numbers(grad.dtype)
        if ctx.needs_input_grad[bias]:
            grads[bias] = grad.flatten(0, -2).sum(0)
        return tuple(grads)

    register_autograd = torch.library.register_autograd
    register_autograd("minillm::nf4_linear", lambda ctx, grad: gradients(ctx, grad, 7), setup_context=keep_nf4)
    register_autograd("minillm::int4_linear", lambda ctx, grad: gradients(ctx, grad, 5), setup_context=keep_int4)
