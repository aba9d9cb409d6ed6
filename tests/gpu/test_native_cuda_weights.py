"""Our CUDA kernels of weights on a real GPU: 4 bits, and linear layers of few rows. Skipped without a GPU or nvcc.

The truth is the formula in float64; our error may be twice that of torch's operations in the same dtype.
"""

import pytest
import torch
import torch.nn.functional as F

from minillm import ops
from minillm.generation import generate_tokens
from minillm.models import ModelConfig, build
from minillm.ops import native
from minillm.ops.build import build as build_kernels
from minillm.ops.int4 import int4_dequantize
from minillm.ops.linear import linear
from minillm.ops.quantize import nf4_dequantize, nf4_quantize
from minillm.peft import LoraConfig, quantize, tune

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
SHAPES = [(1, 1), (5, 7), (131, 33), (64, 128), (33, 688), (256, 2048), (7, 4100)]  # Dout, Din
BLOCKS = [64, 6, 32, 256]


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels():
    if reason := native.obstacle("cuda"):
        pytest.skip(f"no CUDA kernels: {reason}")
    build_kernels("cuda")
    assert native.loaded() and "cuda" in native._devices, "another library was loaded before this one was built"


def close(ours, theirs, truth):
    """The largest error is at most twice theirs, or some roundings of the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.is_cuda
    if truth.numel():
        off, usual = ((t.double() - truth).abs().max() for t in (ours, theirs))
        roundings = 8 if ours.dtype == torch.float32 else 1  # one sum by luck exact is no measure for another order
        assert off <= 2 * usual + roundings * torch.finfo(ours.dtype).eps * (1 + truth.abs().max()), (off, usual)


def exact(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@DTYPES
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("dout", "din"), SHAPES)
def test_a_linear_layer_of_few_rows(dout, din, M, with_bias, dtype):
    x, weight, bias = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in ((M, din), (dout, din), (dout,)))
    bias = bias if with_bias else None
    with ops.use_backend("native"):
        close(linear(x, weight, bias), F.linear(x, weight, bias), exact(x, weight, bias))


@DTYPES
def test_rows_that_are_parts_of_larger_tensors(dtype):
    text = torch.randn(2, 6, 64, device=DEVICE, dtype=dtype)
    wide, bias = torch.randn(9, 80, device=DEVICE, dtype=dtype), torch.randn(9, device=DEVICE, dtype=dtype)
    kept = ops.quantize_nf4(wide[:, :64])
    rounded = kept.dequantize(torch.float64)
    for x in (text[:, -1:], text[:, 2], text[0, ::2], text[:, 1:3], text[1, 4], text[..., 1:65][0, :3]):
        for weight in (wide[:, :64], wide[:, 8:72], wide[:, 3:67]):
            weight = weight[:, : x.shape[-1]]
            with ops.use_backend("native"):
                close(linear(x, weight, bias), F.linear(x, weight, bias), exact(x, weight, bias))
        if x.shape[-1] == 64:
            with ops.use_backend("native"):
                y = ops.quantized_linear(x, kept, bias)
            close(y, ops.quantized_linear.implementations["torch"](x, kept, bias), exact(x, rounded, bias))


@DTYPES
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000,), (3, 4, 5)])
def test_codes_and_numbers_are_those_of_the_torch_path(shape, block, dtype):
    weight = torch.randn(shape, device=DEVICE, dtype=dtype)
    weight.view(-1)[:block] = 0  # a block of zeros
    expected = nf4_quantize.implementations["reference"](weight, block)
    with ops.use_backend("native"):
        found = nf4_quantize(weight, block)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    for double in (True, False):
        kept = ops.quantize_nf4(weight, block=block, double=double)
        with ops.use_backend("native"):
            numbers = kept.dequantize(dtype)
        assert torch.equal(numbers, nf4_dequantize.implementations["reference"](kept, dtype))


@DTYPES
@DOUBLE
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("dout", "din"), SHAPES)
def test_a_quantized_layer(dout, din, block, double, dtype):
    weight = ops.quantize_nf4(torch.randn(dout, din, device=DEVICE), block=block, double=double)
    some = torch.randn(dout, device=DEVICE, dtype=dtype)
    for M in (0, 1, 2, 3, 4, 5, 8, 9, 40):
        x, bias = torch.randn(M, din, device=DEVICE, dtype=dtype), some if M % 2 else None
        with ops.use_backend("native"):
            y = ops.quantized_linear(x, weight, bias)
        theirs = ops.quantized_linear.implementations["torch"](x, weight, bias)
        close(y, theirs, exact(x, weight.dequantize(torch.float64), bias))


@DTYPES
@pytest.mark.parametrize(("dout", "din", "group"), [(5, 8, 8), (33, 96, 32), (130, 2048, 64), (3, 30, 6)])
def test_a_layer_in_whole_numbers(dout, din, group, dtype):
    numbers = torch.randn(dout, din, device=DEVICE) + 3 * torch.randn(dout, 1, device=DEVICE)  # so that zeros count
    weight, bias = ops.quantize_int4(numbers, group=group), torch.randn(dout, device=DEVICE, dtype=dtype)
    with ops.use_backend("native"):
        assert torch.equal(weight.dequantize(dtype), int4_dequantize.implementations["reference"](weight, dtype))
    for M in (0, 1, 2, 3, 4, 5, 8, 9, 40):
        x = torch.randn(M, din, device=DEVICE, dtype=dtype)
        with ops.use_backend("native"):
            y = ops.quantized_linear(x, weight, bias)
        theirs = ops.quantized_linear.implementations["torch"](x, weight, bias)
        close(y, theirs, exact(x, weight.dequantize(torch.float64), bias))


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 30])
def test_gradients(M, dtype):
    kept, weight = ops.quantize_nf4(torch.randn(33, 64, device=DEVICE)), torch.randn(33, 64, device=DEVICE, dtype=dtype)
    x, bias = (torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in ((M, 64), (33,)))
    grad = torch.randn(M, 33, device=DEVICE, dtype=dtype)
    for layer, torchs, numbers, wanted in (
        (ops.quantized_linear, ops.quantized_linear.implementations["torch"], kept.dequantize(), (x, bias)),
        (linear, F.linear, weight.requires_grad_(), (x, bias, weight)),
    ):
        given = kept if layer is ops.quantized_linear else weight
        with ops.use_backend("native"):
            ours = torch.autograd.grad(layer(x, given, bias), wanted, grad)
        theirs = torch.autograd.grad(torchs(x, given, bias), wanted, grad)
        truth = torch.autograd.grad(exact(x, numbers, bias), wanted, grad.double())
        for one, two, three in zip(ours, theirs, truth, strict=True):
            close(one, two, three.double())


@pytest.mark.parametrize("differentiable", [True, False])
@DOUBLE
def test_torch_accepts_the_operations(double, differentiable):
    weight = torch.randn(33, 64, device=DEVICE)
    kept, check = ops.quantize_nf4(weight, double=double), torch.library.opcheck
    x, bias = (torch.randn(s, device=DEVICE, requires_grad=differentiable) for s in ((3, 64), (33,)))
    check(torch.ops.minillm.linear.default, (x, weight, bias))
    check(torch.ops.minillm.nf4_quantize.default, (weight, kept.book, 64))
    check(torch.ops.minillm.nf4_dequantize.default, (*kept[:6], 33, 64, torch.bfloat16))
    check(torch.ops.minillm.nf4_linear.default, (x, *kept[:6], bias, 33))
    whole = ops.quantize_int4(weight)
    check(torch.ops.minillm.int4_dequantize.default, (*whole[:4], 64, torch.bfloat16))
    check(torch.ops.minillm.int4_linear.default, (x, *whole[:4], bias))


def test_what_lies_on_another_device_is_refused():
    x, weight, kept = torch.randn(2, 64), torch.randn(5, 64), ops.quantize_nf4(torch.randn(5, 64))
    for arguments in ((x.to(DEVICE), weight, None), (x.to(DEVICE), weight.to(DEVICE), torch.randn(5))):
        with pytest.raises(RuntimeError, match="all tensors on one device"):
            torch.ops.minillm.linear(*arguments)
    with pytest.raises(RuntimeError, match="all tensors on one device"):
        torch.ops.minillm.nf4_linear(x.to(DEVICE), *kept[:6], None, 5)
    with ops.use_backend("native"), pytest.raises(ValueError, match="on different devices"):
        ops.quantized_linear(x.to(DEVICE), kept, None)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_quantized_model_and_its_tokens_are_those_of_torch(adapted):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=128)
    model = build(ModelConfig(**sizes, init_std=0.1))
    quantize(model)
    if adapted:
        tune(model, LoraConfig(rank=3, alpha=7, targets=("all-linear",)))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1)
    model, tokens = model.to(DEVICE), torch.randint(2, 61, (2, 12), device=DEVICE)
    trainable, results = [p for p in model.parameters() if p.requires_grad], {}
    for backend in ("native", "torch"):
        with ops.use_backend(backend):
            logits = model(tokens)
            grads = torch.autograd.grad(logits.square().sum(), trainable)
            results[backend] = logits, *grads
            results[backend + " tokens"] = generate_tokens(model.eval(), tokens, max_new_tokens=40)
    for ours, theirs in zip(results["native"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(results["native tokens"], results["torch tokens"])
