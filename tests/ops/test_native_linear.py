"""Our kernels of linear layers for few rows, plain and with a low-rank update, against float64."""

import pytest
import torch
import torch.nn.functional as F

from minillm import ops
from minillm.ops.linear import ROWS, linear

pytestmark = pytest.mark.usefixtures("native_library")
SHAPES = [(1, 1), (7, 5), (16, 64), (33, 131), (24, 8), (256, 70), (688, 256)]  # Din, Dout
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def inputs(rows, din, dout, dtype, bias=True):
    x, weight = torch.randn(*rows, din).to(dtype), torch.randn(dout, din).to(dtype)
    return x, weight, torch.randn(dout).to(dtype) if bias else None


def factors(din, dout, rank, dtype):
    return torch.randn(rank, din).to(dtype), torch.randn(dout, rank).to(dtype)


def exact(x, weight, bias, a=None, b=None, scale=0.0):
    x, weight, bias, a, b = (None if t is None else t.double() for t in (x, weight, bias, a, b))
    y = F.linear(x, weight, bias)
    return y if a is None else y + scale * ((x @ a.mT) @ b.mT)


def within(ours, theirs, truth):
    """Our largest error is at most twice theirs, or a rounding of the result."""
    if truth.numel():
        ours_off, theirs_off = ((t.double() - truth).abs().max() for t in (ours, theirs))
        assert ours_off <= 2 * theirs_off + torch.finfo(ours.dtype).eps * (1 + truth.abs().max()), (
            ours_off,
            theirs_off,
        )


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2,), (3,), (4,), (1, 1), (2, 2), (1, 3, 1), (5,), (0,), (2, 0), ()])
@pytest.mark.parametrize(("din", "dout"), SHAPES)
def test_as_exact_as_the_library(din, dout, rows, bias, dtype):
    x, weight, bias = inputs(rows, din, dout, dtype, bias)
    with ops.use_backend("native"):
        y = linear(x, weight, bias)
    assert y.shape == (*rows, dout) and y.dtype == dtype
    within(y, F.linear(x, weight, bias), exact(x, weight, bias))


@DTYPES
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 21, 64])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("din", "dout"), [(33, 131), (64, 64), (256, 70)])
def test_a_low_rank_update_is_added(din, dout, M, rank, low, dtype):
    x, weight, bias = inputs((M,), din, dout, dtype)
    a, b = factors(din, dout, rank, dtype if low else torch.float32)
    with ops.use_backend("native"):
        y = ops.lora_linear(x, weight, bias, a, b, 0.5)
    assert y.dtype == dtype
    theirs = ops.lora_linear.implementations["reference"](x, weight, bias, a, b, 0.5)
    within(y, theirs, exact(x, weight, bias, a, b, 0.5))


def test_nothing_of_the_kernel_is_left_to_the_library(monkeypatch):
    """What the tests above compare is our kernel's, up to 4 rows."""
    x, weight, bias = inputs((ROWS,), 33, 20, torch.float32)
    a, b = factors(33, 20, 2, torch.float32)
    for name in ("linear", "lora_linear"):
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("the library's product ran"))
        with ops.use_backend("native"), torch.no_grad():
            linear(x, weight, bias) if name == "linear" else ops.lora_linear(x, weight, bias, a, b, 1.0)


@DTYPES
def test_rows_that_are_parts_of_larger_tensors(dtype):
    text = torch.randn(2, 6, 40).to(dtype)
    weight, bias = torch.randn(9, 50).to(dtype)[:, 3:43], torch.randn(9).to(dtype)
    a, b = torch.randn(4, 50).to(dtype)[:, 3:43], torch.randn(4, 9).to(dtype).mT
    for x in (text[:, -1:], text[:, 2], text[0, ::2], text[:, 1:3], text[1, 4]):
        with ops.use_backend("native"):
            y, adapted = linear(x, weight, bias), ops.lora_linear(x, weight, bias, a, b, 2.0)
        within(y, F.linear(x, weight, bias), exact(x, weight, bias))
        theirs = ops.lora_linear.implementations["reference"](x, weight, bias, a, b, 2.0)
        within(adapted, theirs, exact(x, weight, bias, a, b, 2.0))


@pytest.mark.parametrize("M", [1, 3])
def test_threads_do_not_change_a_bit(M):
    x, weight, bias = inputs((M,), 512, 1500, torch.float32)  # 3 MB: six blocks
    a, b = factors(512, 1500, 8, torch.float32)
    found = []
    with ops.use_backend("native"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((linear(x, weight, bias), ops.lora_linear(x, weight, bias, a, b, 1.5)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("rows", [(3,), (1, 2)])
def test_gradients(rows, dtype):
    x, weight, bias = inputs(rows, 12, 7, dtype)
    a, b = factors(12, 7, 3, torch.float32)
    wanted = [t.requires_grad_() for t in (x, weight, bias, a, b)]
    grad = torch.randn(*rows, 7).to(dtype)
    with ops.use_backend("native"):
        y, adapted = linear(x, weight, bias), ops.lora_linear(x, weight, bias, a, b, 0.5)
    tolerance = {"rtol": 2e-2, "atol": 8e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for ours, truth, of in (
        (y, exact(x, weight, bias), wanted[:3]),
        (adapted, exact(x, weight, bias, a, b, 0.5), wanted),
    ):
        ours = torch.autograd.grad(ours, of, grad)
        torch.testing.assert_close(ours, torch.autograd.grad(truth, of, grad.double()), **tolerance)


def test_no_gradient_is_made_that_nobody_wants():
    x, weight, bias = inputs((2,), 12, 7, torch.float32)
    a, b = (t.requires_grad_() for t in factors(12, 7, 3, torch.float32))
    with ops.use_backend("native"):
        y = ops.lora_linear(x, weight, bias, a, b, 0.5)
    truth = exact(x, weight, bias, a, b, 0.5)
    pairs = [torch.autograd.grad(t, (a, b), torch.ones_like(t)) for t in (y, truth)]
    torch.testing.assert_close(*pairs)
    with torch.no_grad(), ops.use_backend("native"):
        assert not ops.lora_linear(x, weight, bias, a, b, 0.5).requires_grad


@pytest.mark.parametrize("differentiable", [True, False])
def test_torch_accepts_the_operations(differentiable):
    x, weight, bias = (t.requires_grad_(differentiable) for t in inputs((2, 2), 12, 7, torch.float32))
    a, b = (t.requires_grad_(differentiable) for t in factors(12, 7, 3, torch.float32))
    torch.library.opcheck(torch.ops.minillm.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.minillm.linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.minillm.lora_linear.default, (x, weight, bias, a, b, 0.5))


def test_compiled_without_a_break():
    x, weight, bias = inputs((1, 1), 12, 7, torch.float32)
    with ops.use_backend("native"), torch.no_grad():
        compiled = torch.compile(lambda x: linear(x, weight, bias).relu(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), F.linear(x, weight, bias).relu())


def test_what_no_kernel_takes():
    x, weight, bias = inputs((2,), 12, 7, torch.float32)
    a, b = factors(12, 7, 3, torch.bfloat16)
    with ops.use_backend("native"):
        with pytest.raises(ValueError, match="kernels know float32 and bfloat16, not float64"):
            linear(x.double(), weight.double())
        with pytest.raises(ValueError, match="of different types"):
            linear(x, weight.bfloat16())
        with pytest.raises(ValueError, match="do not lie side by side"):
            linear(x, weight.mT.contiguous().mT)
        with pytest.raises(ValueError, match="bfloat16 factors on a float32 base"):
            ops.lora_linear(x, weight, bias, a, b, 1.0)
        with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            linear(x, weight)
    operation = torch.ops.minillm.linear
    for arguments, reason in (
        ((torch.randn(5, 12), weight, None), "at most 4 rows"),
        ((torch.randn(2, 11), weight, None), "Din"),
        ((x, weight, bias[1:]), "a bias"),
        ((torch.randn(2, 3, 12)[:, :2].mT.contiguous().mT, weight, None), "side by side"),
    ):
        with pytest.raises(RuntimeError, match=f"minillm kernels: .*{reason}"):
            operation(*arguments)


def test_auto_leaves_to_the_library_what_it_does_as_fast():
    wide, small = torch.randn(256, 256), torch.randn(24, 24)
    cases = ((torch.randn(1, 256), wide, ""), (torch.randn(5, 256), wide, "more than 4 rows"))
    cases += ((torch.randn(1, 24), small, "small"), (torch.randn(1, 256), wide.clone().requires_grad_(), "training"))
    for x, weight, reason in cases:
        linear.refused.clear()
        with ops.use_backend("auto"):
            linear(x, weight)
        assert (not linear.refused) if not reason else reason in next(iter(linear.refused)), reason
    linear.refused.clear()
