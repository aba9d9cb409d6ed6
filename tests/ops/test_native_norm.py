"""Our kernel of RMS normalisation against the definition in float64."""

import pytest
import torch

from minillm import ops

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 16), (1, 1, 33), (4, 2, 3, 64), (2, 256), (0, 8)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_float32_and_its_gradients_are_those_of_the_definition(shape, eps):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    inputs = [(x.requires_grad_(), weight.requires_grad_()), (x.double(), weight.double())]
    results = []
    for backend, own in zip(("native", "reference"), inputs, strict=True):
        with ops.use_backend(backend):
            y = ops.rms_norm(*own, eps)
        results.append([y.double(), *torch.autograd.grad((y * y.detach().cos()).sum(), inputs[0])])
    with ops.use_backend("native"), torch.no_grad():
        torch.testing.assert_close(ops.rms_norm(x, weight, eps).double(), results[1][0], rtol=1e-6, atol=1e-6)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_before_the_weight():
    x, weight = torch.randn(50, 37).bfloat16(), (1 + torch.rand(37)).bfloat16()
    with ops.use_backend("native"):
        y = ops.rms_norm(x, weight, 1e-6)
    with ops.use_backend("reference"):
        expected = ops.rms_norm(x, weight, 1e-6)
    assert y.dtype == torch.bfloat16
    differ = y != expected  # a rounding on the other side, where the root mean square differs in its last bit
    assert differ.float().mean() < 0.01
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


def test_zeros_stay_and_nans_keep_to_their_row():
    x = torch.randn(3, 19)
    x[0], x[1, 4] = 0, torch.nan
    with ops.use_backend("native"):
        y = ops.rms_norm(x, torch.ones(19), 1e-6)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("differentiable", [True, False])
def test_torch_accepts_the_operation(differentiable):
    x, weight = torch.randn(2, 3, 20), torch.randn(20)
    arguments = (x.requires_grad_(differentiable), weight.requires_grad_(differentiable), 1e-6)
    torch.library.opcheck(torch.ops.minillm.rms_norm.default, arguments)


def test_two_threads_give_the_same_bits():
    x, weight = torch.randn(301, 40), torch.randn(40)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with ops.use_backend("native"):
            results.append(ops.rms_norm(x, weight, 1e-6))
    assert torch.equal(*results)


def test_what_no_kernel_takes():
    x, weight = torch.randn(4, 6), torch.randn(6)
    with ops.use_backend("native"):
        for arguments, reason in (
            ((x.double(), weight.double()), "kernels know float32 and bfloat16"),
            ((x.t(), torch.randn(4)), "do not lie side by side"),
            ((x.bfloat16(), weight), "different types"),
        ):
            with pytest.raises(ValueError, match=reason):
                ops.rms_norm(*arguments, 1e-6)
    with pytest.raises(RuntimeError, match="minillm kernels: x"):
        torch.ops.minillm.rms_norm(x, weight[:5].contiguous(), 1e-6)


def test_training_is_left_to_torch_and_said():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6)
    with ops.use_backend("auto"):
        assert not ops.rms_norm.runs_natively(x, weight, 1e-6)
        with torch.no_grad():
            assert ops.rms_norm.runs_natively(x, weight, 1e-6)
        ops.rms_norm(x, weight, 1e-6)
        assert "training" in ops.info()["rms_norm"]["torch"]


@pytest.mark.parametrize("differentiable", [True, False])
def test_compiling_gives_the_same(differentiable):
    x, weight = torch.randn(2, 3, 20, requires_grad=differentiable), torch.randn(20)
    with ops.use_backend("native"):
        expected = ops.rms_norm(x, weight, 1e-6)
        y = torch.compile(ops.rms_norm, backend="aot_eager", fullgraph=True)(x, weight, 1e-6)
    assert torch.equal(y, expected)
    if differentiable:
        ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        torch.testing.assert_close(ours, theirs)
