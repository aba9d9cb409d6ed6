"""Weights in NF4 by our kernels: quantized and dequantized in one pass, and multiplied without a copy in floats."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from minillm.ops.int4 import Int4Tensor
from minillm.ops.native import below_autograd, wants_grad
from minillm.ops.native_linear import _regular, rows_of, why_not_linear
from minillm.ops.quantize import NF4, QuantTensor, nf4_dequantize, nf4_quantize, pairs
from minillm.ops.quantized import quantized_linear

ROWS = {torch.float32: 512, torch.bfloat16: 64}  # for more, a library's product of the numbers is as fast
GPU_ROWS, GPU_CODES = 8, 32  # the GPU's fast kernel: up to so many rows, whole sets of so many codes (nf4_linear.cu)


def _cannot(x: Tensor, weight: QuantTensor | Int4Tensor, bias: Tensor | None) -> str:
    if not isinstance(weight, QuantTensor):
        return "weights in whole numbers of 4 bits"
    if len(weight.shape) != 2:
        return "a weight that is no matrix"
    if weight.codes.device != x.device:
        return "the tensors are on different devices"
    return why_not_linear(x)


def _few(x: Tensor, weight: QuantTensor) -> bool:
    """Whether the rows of x are few enough for multiplying codes to be faster than making numbers of them first."""
    if x.is_cuda:
        return rows_of(x) <= GPU_ROWS and x.shape[-1] % GPU_CODES == 0 and weight.block % GPU_CODES == 0
    return rows_of(x) <= ROWS[x.dtype]


@quantized_linear.native(_cannot)
def _quantized_linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if not _few(x, weight):
        return _Nf4Linear.apply(x, weight, bias) if wants_grad(x) else F.linear(x, dequantize(weight, x.dtype), bias)
    operation = torch.ops.minillm.nf4_linear.default
    arguments = (_regular(x), *weight[:6], None if bias is None else bias.contiguous(), weight.shape[0])
    if torch.compiler.is_compiling() or wants_grad(x) or (bias is not None and wants_grad(bias)):
        return operation(*arguments)
    return below_autograd(operation, *arguments)


class _Nf4Linear(torch.autograd.Function):
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


def dequantize(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a weight in NF4."""
    count = torch.Size(weight.shape).numel()
    return torch.ops.minillm.nf4_dequantize(*weight[:6], 1, count, dtype).view(weight.shape)


def _cannot_dequantize(weight: QuantTensor, dtype: torch.dtype) -> str:
    return why_not_linear(weight.book) or ("" if dtype in ROWS else "numbers other than float32 and bfloat16")


nf4_dequantize.native(_cannot_dequantize)(dequantize)


def _cannot_quantize(weight: Tensor, block: int) -> str:
    return why_not_linear(weight.new_empty(1))  # however the weight lies: it is copied if need be


@nf4_quantize.native(_cannot_quantize)
def _nf4_quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return torch.ops.minillm.nf4_quantize(weight.contiguous(), pairs(NF4, weight.device), block)


def register() -> None:
    """Tell torch the operations' shapes and gradients."""

    @torch.library.register_fake("minillm::nf4_quantize")
    def _(weight, book, block):
        blocks = -(-weight.numel() // block)
        codes = weight.new_empty(blocks, block // 2, dtype=torch.uint8)
        return codes, weight.new_empty(blocks, dtype=torch.float32)

    @torch.library.register_fake("minillm::nf4_dequantize")
    def _(codes, absmax, absmax2, offset, book, book8, Dout, Din, dtype):
        return codes.new_empty(Dout, Din, dtype=dtype)

    @torch.library.register_fake("minillm::nf4_linear")
    def _(x, codes, absmax, absmax2, offset, book, book8, bias, Dout):
        return x.new_empty(*x.shape[:-1], Dout)

    def keep(ctx, inputs, output):
        x, *ctx.weight, _, ctx.Dout = inputs
        ctx.Din = x.shape[-1]

    def backward(ctx, grad):
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
        grad_x = None
        if need_x:
            grad_x = grad @ torch.ops.minillm.nf4_dequantize(*ctx.weight, ctx.Dout, ctx.Din, grad.dtype)
        grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return grad_x, *(None,) * 6, grad_bias, None

    torch.library.register_autograd("minillm::nf4_linear", backward, setup_context=keep)
