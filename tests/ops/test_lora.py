"""LoRA ops: values against the formula in float64, gradients against autograd's own and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minillm.ops.lora import lora, lora_linear
from minillm.ops.registry import use_backend

SCALE = 2.5  # not 1: a forgotten scale must show
BACKENDS = ["reference", "torch"]


def inputs(*rows, d_in=5, d_out=7, rank=3, dtype=torch.float64, bias=True):
    """x, weight, bias, a, b with gradients asked for everywhere; the sizes are odd and all different."""
    torch.manual_seed(0)
    shapes = [(*rows, d_in), (d_out, d_in), (d_out,), (rank, d_in), (d_out, rank)]
    x, weight, shift, a, b = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return x, weight, shift if bias else None, a, b


def by_hand(x, weight, bias, a, b):
    """(W + scale B A) x + bias: the update made a matrix first, another way round than either implementation."""
    return F.linear(x, weight + SCALE * (b @ a), bias)


def test_hand_computed_values():
    """x = (1, 2), W = I, A = (3, 4), B = (1, -1)^T: A x = 11, so y = (1, 2) + 0.5 * 11 * (1, -1) = (6.5, -3.5)."""
    x, weight = torch.tensor([1.0, 2.0]), torch.eye(2)
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])
    for backend in BACKENDS:
        with use_backend(backend):
            assert lora_linear(x, weight, None, a, b, 0.5).tolist() == [6.5, -3.5]
    assert lora(torch.tensor([10.0, 20.0]), x, a, b, 0.5).tolist() == [15.5, 14.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (), (4,), (2, 0), (2, 3), (2, 1, 3)])
def test_output_and_all_gradients(backend, rows, bias):
    tensors = inputs(*rows, bias=bias)
    wanted = [t for t in tensors if t is not None]
    with use_backend(backend):
        y = lora_linear(*tensors, SCALE)
    expected = by_hand(*tensors)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(y, wanted, grad)
    truth = torch.autograd.grad(expected, wanted, grad)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("needed", range(1, 32))
def test_gradients_for_every_subset_of_inputs(needed):
    """Each input frozen or not: the backward gives what is asked for, and nothing for what is frozen."""
    tensors = [t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs(4))]
    y = lora_linear(*tensors, SCALE)
    y.square().sum().backward()
    wanted = [t for t in tensors if t.requires_grad]
    truth = torch.autograd.grad(by_hand(*tensors).square().sum(), wanted)
    torch.testing.assert_close([t.grad for t in wanted], list(truth))
    assert all(t.grad is None for t in tensors if not t.requires_grad)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, SCALE), inputs(2, 3))
    y, (x, _, _, a, b) = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), inputs(2, 3)
    assert torch.autograd.gradcheck(lambda *t: lora(*t, SCALE), (y, x, a, b))


def test_non_contiguous_input_and_gradient():
    x, weight, bias, a, b = inputs(5, 3)
    y = lora_linear(x.transpose(0, 1), weight, bias, a, b, SCALE)
    expected = by_hand(x.transpose(0, 1), weight, bias, a, b)
    torch.testing.assert_close(y, expected)
    grad = torch.randn(7, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    wanted = (x, weight, bias, a, b)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad))


def test_keeps_for_the_backward_only_what_it_needs():
    """Besides parameters x itself (no copy) and u^T, R numbers for each row; nothing where the adapter is frozen."""
    x, weight, bias, a, b = inputs(2, 4)
    frozen = [t.detach() for t in (weight, bias)]

    def held(a, b):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_linear(x, *frozen, a, b, SCALE)
        return [t for t in kept if t.data_ptr() not in {p.data_ptr() for p in (*frozen, a, b)}]

    assert sorted(t.numel() for t in held(a, b)) == [3 * 8, 5 * 8]
    assert x.data_ptr() in {t.data_ptr() for t in held(a, b)}
    assert held(a.detach(), b.detach()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapter_on_bfloat16_base(backend):
    """The update is made in float32 and the sum rounded once; the truth is float64 from the same bfloat16 values."""
    x, weight, bias, a, b = (t.detach().float() for t in inputs(64))
    x, weight, bias = (t.bfloat16().requires_grad_() for t in (x, weight, bias))
    a, b = a.requires_grad_(), b.requires_grad_()
    exact = by_hand(*(t.double() for t in (x, weight, bias, a, b)))
    with use_backend(backend):
        y = lora_linear(x, weight, bias, a, b, SCALE)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0.05)  # bfloat16 has 8 significant bits
    wanted, grad = (x, a, b), torch.ones_like(exact)
    grads = torch.autograd.grad(y, wanted, grad.bfloat16())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, truth in zip(grads, torch.autograd.grad(exact, wanted, grad), strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=2**-6, atol=0.1)


def test_autocast_runs_in_bfloat16_with_float32_gradients():
    tensors = [t.detach().float().requires_grad_() for t in inputs(2, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*tensors, SCALE)
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        reference = lora_linear(*tensors, SCALE)
    assert y.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), by_hand(*tensors), rtol=2**-6, atol=0.1)
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)
    for ours, truth in zip(grads, torch.autograd.grad(by_hand(*tensors).sum(), tensors), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2**-6, atol=0.3)


def test_gradient_checkpointing_changes_nothing():
    tensors = inputs(4)
    direct = torch.autograd.grad(lora_linear(*tensors, SCALE).square().sum(), tensors)
    recomputed = checkpoint(lora_linear, *tensors, SCALE, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), tensors), direct, rtol=0, atol=0)


def test_second_derivative_is_refused_by_torch_and_given_by_the_reference():
    x, weight, bias, a, b = inputs(4)
    (grad,) = torch.autograd.grad(lora_linear(x, weight, bias, a, b, SCALE).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: lora_linear(*t, SCALE), inputs(2))
