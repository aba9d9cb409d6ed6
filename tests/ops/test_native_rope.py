"""Our rotary kernel against the definition in float64."""

import pytest
import torch

from minillm import ops

pytestmark = pytest.mark.usefixtures("native_library")


def inputs(B, H, T, K, dtype, per_row, turned):
    x = torch.randn(B, T, H, K).to(dtype).transpose(1, 2) if turned else torch.randn(B, H, T, K).to(dtype)
    positions = torch.randint(0, 50, (B, T)) if per_row else torch.arange(T) + 3
    return x, *ops.rotary_table(positions, K)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(
    ("B", "H", "T", "K"), [(1, 1, 1, 2), (2, 3, 5, 16), (3, 2, 7, 34), (1, 4, 9, 64), (2, 1, 3, 128)]
)
def test_float32_and_its_gradient_are_those_of_the_definition(B, H, T, K, per_row, turned):
    x, cos, sin = inputs(B, H, T, K, torch.float32, per_row, turned)
    x.requires_grad_()
    weight = torch.randn(x.shape)
    with ops.use_backend("native"):
        y = ops.rope(x, cos, sin)
    with ops.use_backend("reference"):
        expected = ops.rope(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad((z * weight).sum(), x) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_row", [True, False])
def test_bfloat16_is_computed_in_float32_and_rounded_once(per_row):
    x, cos, sin = inputs(2, 3, 5, 34, torch.bfloat16, per_row, True)
    with ops.use_backend("native"):
        y = ops.rope(x, cos, sin)
    with ops.use_backend("reference"):
        expected = ops.rope(x, cos, sin)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=0)  # fused products may fall on the other side of a tie


def test_infinities_and_nans_pass():
    x, cos, sin = inputs(1, 1, 2, 4, torch.bfloat16, False, False)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = torch.nan, torch.inf
    with ops.use_backend("native"):
        y = ops.rope(x, cos, sin)
    assert y[0, 0, 0, [0, 2]].isnan().all() and y[0, 0, 1, [1, 3]].isinf().all() and y[0, 0, 0, 1].isfinite()


@pytest.mark.parametrize("differentiable", [True, False])
def test_torch_accepts_the_operation(differentiable):
    x, cos, sin = inputs(2, 3, 5, 16, torch.float32, True, True)
    torch.library.opcheck(torch.ops.minillm.rope.default, (x.requires_grad_(differentiable), cos, sin))


def test_what_no_kernel_takes():
    x, cos, sin = inputs(2, 3, 5, 16, torch.float32, False, True)
    with ops.use_backend("native"):
        for arguments, reason in (
            ((x.double(), cos, sin), "kernels know float32 and bfloat16"),
            ((x, cos.double(), sin.double()), "a table that is not of float32"),
        ):
            with pytest.raises(ValueError, match=reason):
                ops.rope(*arguments)
    with pytest.raises(RuntimeError, match="minillm kernels: tables"):
        torch.ops.minillm.rope(x, cos[:2].contiguous(), sin[:2].contiguous())


def test_each_feature_has_a_cosine_and_a_sine_of_its_own():
    """The two halves of our own tables differ in signs alone; a kernel that read one half twice would not be seen."""
    x, cos, sin = torch.randn(2, 3, 5, 70), torch.randn(5, 70), torch.randn(5, 70)
    with ops.use_backend("reference"):
        expected = ops.rope(x.double(), cos.double(), sin.double())
    with ops.use_backend("native"):
        torch.testing.assert_close(ops.rope(x, cos, sin).double(), expected, rtol=1e-5, atol=1e-5)
