"""Weights in whole numbers of 4 bits on our kernels: the torch path's numbers, bit by bit; products against float64."""

import pytest
import torch
import torch.nn.functional as F

from minillm import ops
from minillm.ops.int4 import int4_dequantize
from minillm.ops.native_nf4 import ROWS

pytestmark = pytest.mark.usefixtures("native_library")
SHAPES = [(5, 8, 8), (7, 96, 32), (64, 128, 64), (33, 688, 16), (130, 1024, 128), (3, 30, 6), (9, 24, 24), (1, 2, 2)]
SHAPES += [(17, 512, 256), (6, 48, 4)]  # Dout, Din, group
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def weight_of(dout, din, group):
    """Away from 0, so that zeros count, and with a group of no spread."""
    numbers = torch.randn(dout, din) + 3 * torch.randn(dout, 1)
    numbers[0, :group] = 0.7
    return ops.quantize_int4(numbers, group=group)


def close(ours, theirs, truth):
    """The largest error is at most twice that of the torch path, or some roundings of the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if truth.numel():
        off, usual = ((t.double() - truth).abs().max() for t in (ours, theirs))
        roundings = 8 if ours.dtype == torch.float32 else 1
        assert off <= 2 * usual + roundings * torch.finfo(ours.dtype).eps * (1 + truth.abs().max()), (off, usual)


@DTYPES
@pytest.mark.parametrize(("dout", "din", "group"), SHAPES)
def test_the_numbers_are_those_of_the_torch_path(dout, din, group, dtype):
    weight = weight_of(dout, din, group)
    with ops.use_backend("native"):
        found = weight.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found, int4_dequantize.implementations["reference"](weight, dtype))


@DTYPES
@pytest.mark.parametrize(("dout", "din", "group"), SHAPES)
def test_products(dout, din, group, dtype):
    weight, some = weight_of(dout, din, group), torch.randn(dout).to(dtype)
    for M in (0, 1, 2, 3, 4, 5, 8, 9, 40, ROWS[dtype] + 1):
        x, bias = torch.randn(M, din).to(dtype), some if M % 2 else None
        with ops.use_backend("native"):
            y = ops.quantized_linear(x, weight, bias)
        truth = F.linear(x.double(), weight.dequantize(torch.float64), None if bias is None else bias.double())
        close(y, ops.quantized_linear.implementations["torch"](x, weight, bias), truth)


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 12, 600])
def test_gradients(M, dtype):
    weight = weight_of(33, 48, 16)
    x, bias = torch.randn(M, 1, 48).to(dtype).requires_grad_(), torch.randn(33).to(dtype).requires_grad_()
    grad = torch.randn(M, 1, 33).to(dtype)
    with ops.use_backend("native"):
        ours = torch.autograd.grad(ops.quantized_linear(x, weight, bias), (x, bias), grad)
    theirs = torch.autograd.grad(ops.quantized_linear.implementations["torch"](x, weight, bias), (x, bias), grad)
    truth = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    truth = torch.autograd.grad(truth, (x, bias), grad.double())
    for one, two, exact in zip(ours, theirs, truth, strict=True):
        close(one, two, exact.double())


@pytest.mark.parametrize("M", [1, 3, 64])
def test_threads_do_not_change_a_bit(M):
    weight, x, found = weight_of(1100, 1024, 32), torch.randn(M, 1024), []
    with ops.use_backend("native"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((ops.quantized_linear(x, weight, None), weight.dequantize()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_torch_accepts_the_operations():
    weight = weight_of(33, 48, 16)
    torch.library.opcheck(torch.ops.minillm.int4_dequantize.default, (*weight[:4], 48, torch.bfloat16))
    for differentiable in (True, False):
        x, bias = (torch.randn(shape, requires_grad=differentiable) for shape in ((3, 48), (33,)))
        torch.library.opcheck(torch.ops.minillm.int4_linear.default, (x, *weight[:4], bias))


def test_compiled_without_a_break():
    weight, x = weight_of(33, 48, 16), torch.randn(3, 48).requires_grad_()
    with ops.use_backend("native"):
        compiled = torch.compile(
            lambda x: ops.quantized_linear(x, weight, None).relu(), backend="aot_eager", fullgraph=True
        )
        ours, expected = compiled(x), ops.quantized_linear(x, weight, None).relu()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (ours, expected)))


def test_what_no_kernel_takes():
    x, weight = torch.randn(3, 48), weight_of(33, 48, 16)
    with ops.use_backend("native"):
        with pytest.raises(ValueError, match="not float64"):
            ops.quantized_linear(x.double(), weight, None)
        with pytest.raises(ValueError, match="other than float32 and bfloat16"):
            weight.dequantize(torch.float16)
    codes, scale, zero, book = weight[:4]
    for arguments, reason in (
        ((x[:, :32], codes, scale, zero, book, None), "groups fill Din"),
        ((x, codes, scale.flatten(), zero, book, None), "groups fill Din"),
        ((x, codes, scale, zero[:5], book, None), "zeros"),
        ((x, codes, scale.double(), zero, book, None), "float32"),
        ((x, codes, scale, zero, book, torch.randn(5)), "a bias"),
        ((x, codes[:9], scale, zero, book, None), "for all weights"),
    ):
        with pytest.raises(RuntimeError, match=f"minillm kernels: .*{reason}"):
            torch.ops.minillm.int4_linear(*arguments)
