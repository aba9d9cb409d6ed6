"""Our kernel of mixed batches of adapters against each row's own product, made by hand in float64."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from minillm import ops

pytestmark = pytest.mark.usefixtures("native_library")
SCALES = (2.5, -0.5, 1.0, 3.0)
RANKS = (32, 1, 5, 2)
ROWS = {
    "a different one each": [2, 0, 3, 1],
    "some without": [0, -1, 1, -1, 0, 2],
    "out of order and repeated": [3, 0, 3, 3, 0],
    "none at all": [-1, -1],
    "one row": [1],
    "no row": [],
}
DTYPES = {  # of x and y, and of the factors
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 on bfloat16": (torch.bfloat16, torch.float32),
}
SHAPES = [(1, 6, 7), (1, 64, 48), (4, 33, 20), (3, 256, 130), (50, 20, 33), (0, 6, 7)]  # T, Din, Dout
TYPES = pytest.mark.parametrize(("low", "thin"), DTYPES.values(), ids=DTYPES)


def inputs(rows, T, din, dout, low=torch.float32, thin=torch.float32, ranks=RANKS, bank=True):
    """y, x, and the stacks of A and B: B with Dout side by side as a bank has it, or with R."""
    shapes = [(len(rows), T, dout), (len(rows), T, din)]
    y, x = (torch.randn(shape).to(low) for shape in shapes)
    a = pad_sequence([torch.randn(rank, din).to(thin) for rank in ranks], batch_first=True)
    b = pad_sequence([torch.randn(rank, dout).to(thin) for rank in ranks], batch_first=True).mT
    scale = torch.tensor(SCALES[: len(ranks)], dtype=thin)  # all of them exact in bfloat16
    return y, x, a, b if bank else b.contiguous(), torch.tensor(rows, dtype=torch.long), scale


def native(*arguments):
    with ops.use_backend("native"):
        return ops.lora_gather(*arguments)


def by_hand(y, x, a, b, rows, scale):
    y, x, a, b, scale = (t.double() for t in (y, x, a, b, scale))
    out = [y[i] + (x[i] @ (scale[n] * (b[n] @ a[n])).mT if n >= 0 else 0) for i, n in enumerate(rows.tolist())]
    return torch.stack(out) if out else y * 1.0


def close(ours, theirs, truth):
    """The largest error is at most twice that of the torch path, or some roundings of the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if truth.numel():
        off, usual = ((t.double() - truth).abs().max() for t in (ours, theirs))
        roundings = 8 if ours.dtype == torch.float32 else 1  # one sum by luck exact is no measure for another order
        assert off <= 2 * usual + roundings * torch.finfo(ours.dtype).eps * (1 + truth.abs().max()), (off, usual)


@TYPES
@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("T", "din", "dout"), SHAPES)
def test_as_exact_as_the_torch_path(T, din, dout, rows, bank, low, thin):
    arguments = inputs(rows, T, din, dout, low, thin, bank=bank)
    close(native(*arguments), ops.lora_gather.implementations["torch"](*arguments), by_hand(*arguments))


@TYPES
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("T", "din", "dout"), SHAPES)
def test_all_gradients(T, din, dout, rows, low, thin):
    arguments = inputs(rows, T, din, dout, low, thin)
    wanted = [t.requires_grad_() for i, t in enumerate(arguments) if i != 4]
    grad = torch.randn(len(rows), T, dout).to(low)
    ours, theirs, truth = (
        torch.autograd.grad(way(*arguments), wanted, grad.to(dtype), allow_unused=True, materialize_grads=True)
        for way, dtype in (
            (native, low),
            (ops.lora_gather.implementations["torch"], low),
            (by_hand, torch.float64),
        )
    )
    for one, two, exact in zip(ours, theirs, truth, strict=True):
        close(one, two, exact.double())


def test_the_padding_of_a_lower_rank_may_be_anything_if_ranks_are_given():
    y, x, a, b, rows, scale = inputs([2, 0, 3, 1, -1], 3, 40, 36)
    expected = by_hand(y, x, a, b, rows, scale)
    dirty_a, dirty_b = a.clone(), b.mT.contiguous().mT
    for n, rank in enumerate(RANKS):
        dirty_a[n, rank:], dirty_b[n, :, rank:] = torch.nan, torch.nan
    ranks = torch.tensor(RANKS)
    dirty_a.requires_grad_(), dirty_b.requires_grad_()
    out, _ = torch.ops.minillm.lora_gather(y, x, dirty_a, dirty_b, rows, ranks, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    grads = torch.autograd.grad(out.sum(), (dirty_a, dirty_b))
    a.requires_grad_(), b.requires_grad_()
    truth = torch.autograd.grad(by_hand(y, x, a, b, rows, scale).sum(), (a, b))
    for n, rank in enumerate(RANKS):
        torch.testing.assert_close(grads[0][n, :rank], truth[0][n, :rank], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grads[1][n, :, :rank], truth[1][n, :, :rank], rtol=1e-4, atol=1e-3)
        assert not grads[0][n, rank:].any() and not grads[1][n, :, rank:].any()


@TYPES
@pytest.mark.parametrize("T", [1, 5])
def test_matrices_gathered_before(T, low, thin):
    """`lora_rows`: each row's own, the scale in B."""
    y, x, a, b, *_ = inputs([0, 1, 2, 3], T, 24, 40, low, thin)
    with ops.use_backend("native"):
        ours = ops.lora_rows(y, x, a, b)
    truth = by_hand(y, x, a, b, torch.arange(4), torch.ones(4))
    close(ours, ops.lora_rows.implementations["torch"](y, x, a, b), truth)


def test_no_row_at_all():
    """Strides of an empty tensor say nothing: no layout is a reason to refuse it."""
    empty = torch.empty(0, 3, 7), torch.empty(0, 3, 6), torch.empty(0, 4, 6), torch.empty(0, 7, 4)
    with ops.use_backend("native"):
        assert ops.lora_rows(*empty).shape == (0, 3, 7)


def test_non_contiguous_input_and_gradient():
    y, x, a, b, rows, scale = inputs([1, -1, 0], 4, 12, 7)
    y, x = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (y, x))
    assert not x.is_contiguous()
    wanted = [t.requires_grad_() for t in (y, x, a, b, scale)]
    grad = torch.randn(7, 3, 4).permute(1, 2, 0)
    out, expected = native(y, x, a, b, rows, scale), by_hand(y, x, a, b, rows, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(t, wanted, grad.to(t.dtype)) for t in (out, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit():
    arguments = inputs([2, 0, 3, 1, -1, 2, 2], 120, 700, 600)
    wanted = [t.requires_grad_() for i, t in enumerate(arguments) if i != 4]
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        out = native(*arguments)
        found.append((out, *torch.autograd.grad(out.sum(), wanted)))
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


def test_an_adapter_that_diverged_reaches_its_own_rows_only():
    y, x, a, b, rows, scale = inputs([0, 1, -1, 2], 1, 20, 33)
    a[1], b[1] = torch.nan, torch.inf
    out, expected = native(y, x, a, b, rows, scale), by_hand(y, x, a, b, rows, scale)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2, 3]].double(), expected[[0, 2, 3]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("differentiable", [True, False])
def test_torch_accepts_the_operations(differentiable):
    y, x, a, b, rows, scale = inputs([1, -1, 0, 1], 3, 12, 7)
    y, x, a, b, scale = (t.detach().requires_grad_(differentiable) for t in (y, x, a, b, scale))
    operation = torch.ops.minillm.lora_gather.default
    torch.library.opcheck(operation, (y, x, a, b, rows, None, scale))
    torch.library.opcheck(operation, (y, x, a, b, rows, torch.tensor(RANKS), scale))
    torch.library.opcheck(operation, (y, x, a, b, None, None, None))


def test_compiled_without_a_break():
    y, x, a, b, rows, scale = inputs([1, -1, 0, 1], 3, 12, 7)
    a.requires_grad_()
    with ops.use_backend("native"):
        compiled = torch.compile(lambda *t: ops.lora_gather(*t).relu(), backend="aot_eager", fullgraph=True)
        ours, expected = compiled(y, x, a, b, rows, scale), ops.lora_gather(y, x, a, b, rows, scale).relu()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), a) for t in (ours, expected)))


def test_autocast():
    """x and the factors are cast, as PyTorch's products would; a base that returns float32 is PyTorch's."""
    arguments = inputs([1, -1, 0, 1], 3, 12, 7)
    y, x, a, b, rows, scale = (t.requires_grad_() if t.is_floating_point() else t for t in arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = native(y.bfloat16(), x, a, b, rows, scale)
        with pytest.raises(ValueError, match="autocast to bfloat16 of a layer that returns float32"):
            native(y, x, a, b, rows, scale)
    truth = by_hand(y, x, a, b, rows, scale)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, rtol=2**-5, atol=0.3)
    pairs = [torch.autograd.grad(t.sum(), (x, a, b, scale)) for t in (out, truth)]
    torch.testing.assert_close(*pairs, rtol=2**-4, atol=0.5)


def test_what_no_kernel_takes():
    y, x, a, b, rows, scale = inputs([1, -1], 3, 12, 7)
    for wrong in (4, -2):
        with pytest.raises(ValueError, match=r"an adapter's number, 0\.\.3, or -1 for none"):
            native(y, x, a, b, torch.tensor([0, wrong]), scale)
    for arguments, reason in (
        ((y, x, a.bfloat16(), b.bfloat16(), rows, scale), "bfloat16 factors on a float32 base"),
        ((y.double(), x.double(), a.double(), b.double(), rows, scale), "not float64"),
        ((y, x, a, b.bfloat16(), rows, scale), "factors of different types"),
        ((y.bfloat16(), x, a, b, rows, scale), "of different types"),
    ):
        with pytest.raises(ValueError, match=reason):
            native(*arguments)
    operation = torch.ops.minillm.lora_gather
    for arguments, reason in (
        ((y, x, a, b, rows.int(), None, scale), "of int64"),
        ((y, x, a, b, rows[:1], None, scale), "rows"),
        ((y, x[:, :2], a, b, rows, None, scale), "Dout"),
        ((y, x, a, b[:2], rows, None, scale), "N, Dout, R"),
        ((y, x, a, b, None, None, scale), "as many adapters as rows"),
        ((y, x, a, b, rows, torch.tensor([40, 1, 1, 1]), scale), "ranks"),
        ((y, x, a, b, rows, None, scale.double()), "of float32"),
    ):
        with pytest.raises(RuntimeError, match=f"minillm kernels: .*{reason}"):
            operation(*arguments)
