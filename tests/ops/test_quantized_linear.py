"""The linear layer with a 4-bit weight, against torch's with the same weight as numbers; and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minillm.ops import quantize_int4, quantize_nf4, quantized_linear
from minillm.ops.registry import use_backend

DIN, DOUT = 12, 7
BACKENDS = ["reference", "torch"]
KINDS = {"nf4": quantize_nf4, "int4": lambda weight: quantize_int4(weight, group=4)}
KIND = pytest.mark.parametrize("kind", KINDS)


def inputs(*rows, kind="nf4", dtype=torch.float64, bias=True):
    x = torch.randn(*rows, DIN, dtype=dtype, requires_grad=True)
    shift = torch.randn(DOUT, dtype=dtype, requires_grad=True) if bias else None
    return x, KINDS[kind](torch.randn(DOUT, DIN)), shift


@pytest.mark.parametrize("backend", BACKENDS)
@KIND
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (4,), (2, 3), (2, 1, 3)])
def test_output_and_gradients(backend, kind, rows, bias):
    x, weight, shift = inputs(*rows, kind=kind, bias=bias)
    wanted = [t for t in (x, shift) if t is not None]
    with use_backend(backend):
        y = quantized_linear(x, weight, shift)
    expected = F.linear(x, weight.dequantize(torch.float64), shift)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(y, wanted, grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, wanted, grad))


@KIND
def test_gradcheck(kind):
    x, weight, bias = inputs(2, 3, kind=kind)
    assert torch.autograd.gradcheck(lambda x, bias: quantized_linear(x, weight, bias), (x, bias))


@pytest.mark.parametrize("needs_x, needs_bias", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_gets_a_gradient(needs_x, needs_bias):
    x, weight, bias = inputs(4)
    x, bias = x.detach().requires_grad_(needs_x), bias.detach().requires_grad_(needs_bias)
    y = quantized_linear(x, weight, bias)
    assert y.requires_grad == (needs_x or needs_bias)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (needs_x, needs_bias)


def test_non_contiguous_input_and_gradient():
    x, weight, bias = inputs(5, 3)
    x = x.detach().transpose(0, 1).requires_grad_()
    grad = torch.randn(DOUT, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    y, expected = quantized_linear(x, weight, bias), F.linear(x, weight.dequantize(torch.float64), bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


@KIND
def test_keeps_nothing_for_the_backward_but_the_codes(kind):
    """autograd over the definition keeps the whole weight in numbers."""

    def kept(backend):
        seen = []
        with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            y = quantized_linear(x, weight, bias)
        attributes = [value for value in vars(y.grad_fn).values()] if backend == "torch" else []
        assert all(value is weight for value in attributes)  # the tensors of the layer, and no others
        return sum(t.nbytes for t in seen)

    x, weight, bias = inputs(2, kind=kind)
    assert kept("reference") >= DOUT * DIN * 8
    assert kept("torch") == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_computes_in_the_dtype_of_x(backend):
    x, weight, bias = inputs(64, dtype=torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with use_backend(backend):
        y = quantized_linear(low, weight, bias)
    assert y.dtype == torch.bfloat16
    exact = F.linear(low.float(), weight.dequantize(), bias)
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=0.1)  # bfloat16 has 8 bits; so have weight and bias
    (grad,) = torch.autograd.grad(y.sum(), low)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), weight.dequantize().sum(0).expand(64, -1), rtol=2**-6, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_bfloat16_with_float32_gradients(backend):
    x, weight, bias = inputs(8, dtype=torch.float32)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, weight.dequantize(), bias), rtol=2**-6, atol=0.1)
    grads = torch.autograd.grad(y.float().sum(), (x, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 2


def test_gradient_checkpointing_changes_nothing():
    x, weight, bias = inputs(4)
    direct = torch.autograd.grad(quantized_linear(x, weight, bias).square().sum(), (x, bias))
    recomputed = checkpoint(quantized_linear, x, weight, bias, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), (x, bias)), direct, rtol=0, atol=0)
