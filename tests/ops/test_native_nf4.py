"""Our NF4 kernels: the same codes and numbers, bit by bit, as the torch path; products against float64."""

import pytest
import torch
import torch.nn.functional as F

from minillm import ops
from minillm.ops.native_nf4 import ROWS, dequantize
from minillm.ops.quantize import CHUNK, nf4_dequantize, nf4_quantize

pytestmark = pytest.mark.usefixtures("native_library")
SHAPES = [(5, 7), (64, 128), (33, 688), (48, 256), (7, 24), (130, 1000), (3, 8), (1, 1)]  # Dout, Din
BLOCKS = [64, 2, 6, 32, 128, 256]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def close(ours, theirs, truth):
    """The largest error is at most twice that of the torch path, or some roundings of the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if truth.numel():
        off, usual = ((t.double() - truth).abs().max() for t in (ours, theirs))
        roundings = 8 if ours.dtype == torch.float32 else 1  # one sum by luck exact is no measure for another order
        assert off <= 2 * usual + roundings * torch.finfo(ours.dtype).eps * (1 + truth.abs().max()), (off, usual)


@DTYPES
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000,), (3, 4, 5)])
def test_the_codes_are_those_of_the_torch_path(shape, block, dtype):
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[:block] = 0  # a block of zeros
    expected = nf4_quantize.implementations["reference"](weight, block)
    with ops.use_backend("native"):
        codes, absmax = nf4_quantize(weight, block)
        kept = ops.quantize_nf4(weight, block=block)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])
    for one, two in zip(kept, ops.quantize_nf4(weight, block=block), strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_every_midpoint_goes_to_the_lower_value():
    book = torch.tensor(ops.quantize.NF4)
    middle = (book[1:] + book[:-1]) / 2
    weight = torch.cat([middle, middle.nextafter(torch.ones(())), torch.ones(1), -torch.ones(1)])
    with ops.use_backend("native"):
        codes, _ = nf4_quantize(weight, 32)
    found = torch.stack([codes >> 4, codes & 15], -1).flatten()
    assert found.tolist() == [*range(15), *range(1, 16), 15, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 17, 63, 64, 99])
def test_what_cannot_be_quantized_is_refused(bad, place):
    weight = torch.randn(100)
    weight[place] = bad
    with ops.use_backend("native"), pytest.raises(ValueError, match="NaN or infinity"):
        ops.quantize_nf4(weight)


def test_a_transposed_weight():
    weight = torch.randn(24, 40).mT
    with ops.use_backend("native"):
        kept = ops.quantize_nf4(weight)
    assert torch.equal(kept.codes, ops.quantize_nf4(weight.contiguous()).codes)


@DTYPES
@DOUBLE
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000,), (3, 4, 5)])
def test_the_numbers_are_those_of_the_torch_path(shape, block, double, dtype):
    kept = ops.quantize_nf4(torch.randn(shape), block=block, double=double)
    expected = kept.dequantize(dtype)
    with ops.use_backend("native"):
        found = kept.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


@DTYPES
@DOUBLE
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, block, double, dtype):
    weight = ops.quantize_nf4(torch.randn(shape), block=block, double=double)
    bias = torch.randn(shape[0]).to(dtype)
    for M in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 40, ROWS[dtype] + 1):
        for b in (bias, None):
            x = torch.randn(M, shape[1]).to(dtype)
            with ops.use_backend("native"):
                y = ops.quantized_linear(x, weight, b)
            truth = F.linear(x.double(), weight.dequantize().double(), None if b is None else b.double())
            close(y, ops.quantized_linear.implementations["torch"](x, weight, b), truth)


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 12, 600])
def test_gradients(M, dtype):
    weight = ops.quantize_nf4(torch.randn(33, 48))
    x, bias = torch.randn(M, 1, 48).to(dtype).requires_grad_(), torch.randn(33).to(dtype).requires_grad_()
    grad = torch.randn(M, 1, 33).to(dtype)
    with ops.use_backend("native"):
        ours = torch.autograd.grad(ops.quantized_linear(x, weight, bias), (x, bias), grad)
    theirs = torch.autograd.grad(ops.quantized_linear.implementations["torch"](x, weight, bias), (x, bias), grad)
    truth = F.linear(x.double(), weight.dequantize().double(), bias.double())
    truth = torch.autograd.grad(truth, (x, bias), grad.double())
    for one, two, exact in zip(ours, theirs, truth, strict=True):
        close(one, two, exact.double())


def test_rows_that_are_parts_of_larger_tensors():
    weight, text = ops.quantize_nf4(torch.randn(9, 40)), torch.randn(2, 6, 40)
    for x in (text[:, -1:], text[:, 2], text[0, ::2], text[:, 1:3], text[1, 4], text.mT.contiguous().mT):
        if x.stride(-1) == 1:
            with ops.use_backend("native"):
                y = ops.quantized_linear(x, weight, None)
            torch.testing.assert_close(y, F.linear(x, weight.dequantize()))


@pytest.mark.parametrize("M", [1, 3, 8, 64])
def test_threads_do_not_change_a_bit(M):
    weight, x = ops.quantize_nf4(torch.randn(1100, 1024)), torch.randn(M, 1024)
    found = []
    with ops.use_backend("native"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((ops.quantized_linear(x, weight, None), weight.dequantize(), *ops.quantize_nf4(x, block=32)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_weight_of_many_parallel_parts():
    weight = torch.randn(2 * CHUNK + 130)
    with ops.use_backend("native"):
        kept = ops.quantize_nf4(weight)
        numbers = kept.dequantize()
    expected = ops.quantize_nf4(weight)
    assert torch.equal(kept.codes, expected.codes) and torch.equal(numbers, expected.dequantize())


def test_torch_accepts_the_operations():
    x, weight = torch.randn(3, 48), torch.randn(33, 48)
    for double in (True, False):
        kept = ops.quantize_nf4(weight, double=double)
        torch.library.opcheck(torch.ops.minillm.nf4_quantize.default, (weight, kept.book, 64))
        torch.library.opcheck(torch.ops.minillm.nf4_dequantize.default, (*kept[:6], 33, 48, torch.bfloat16))
        for differentiable in (True, False):
            bias = torch.randn(33).requires_grad_(differentiable)
            arguments = (x.detach().requires_grad_(differentiable), *kept[:6], bias, 33)
            torch.library.opcheck(torch.ops.minillm.nf4_linear.default, arguments)


def test_compiled_without_a_break():
    kept, x = ops.quantize_nf4(torch.randn(33, 48)), torch.randn(3, 48).requires_grad_()
    with ops.use_backend("native"):
        compiled = torch.compile(
            lambda x: ops.quantized_linear(x, kept, None).relu(), backend="aot_eager", fullgraph=True
        )
        ours, expected = compiled(x), ops.quantized_linear(x, kept, None).relu()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (ours, expected)))


def test_what_no_kernel_takes():
    x, kept = torch.randn(3, 48), ops.quantize_nf4(torch.randn(33, 48))
    with ops.use_backend("native"):
        with pytest.raises(ValueError, match="not float64"):
            ops.quantized_linear(x.double(), kept, None)
        with pytest.raises(ValueError, match="other than float32 and bfloat16"):
            nf4_dequantize(kept, torch.float64)
        with pytest.raises(ValueError, match="not float16"):
            ops.quantize_nf4(torch.randn(64).half())
    linear, tensors = torch.ops.minillm.nf4_linear, kept[:6]
    for arguments, reason in (
        ((x, *tensors, None, 34), "for all weights"),
        ((x, *tensors, torch.randn(5), 33), "a bias"),
        ((x, tensors[0].int(), *tensors[1:], None, 33), "codes"),
        ((x, tensors[0], tensors[1], None, *tensors[3:], None, 33), "float32"),
        ((x, *tensors[:4], tensors[4][:9], tensors[5], None, 33), "code books"),
    ):
        with pytest.raises(RuntimeError, match=f"minillm kernels: .*{reason}"):
            linear(*arguments)
    assert torch.equal(dequantize(kept, torch.float32), kept.dequantize())
