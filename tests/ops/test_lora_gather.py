"""Mixed batches: the three ways agree with separate LoRAs of their own ranks, made by hand in float64."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from minillm.ops import lora_gather, lora_rows, lora_segments, use_backend

WAYS = {
    "reference": lora_gather.implementations["reference"],
    "padded": lora_gather.implementations["torch"],
    "segments": lora_segments,
}
WAY = pytest.mark.parametrize("way", WAYS)
SCALES = (2.5, -0.5, 1.0, 3.0)  # all different: one adapter's scale on another must show
ROWS = {  # the adapter of each row, of ranks 32, 1, 5 and 2
    "a different one each": [2, 0, 3, 1],
    "some without": [0, -1, 1, -1, 0, 2],
    "out of order and repeated": [3, 0, 3, 3, 0],
    "some adapters unused": [1, 1, 3],
    "one for all": [0, 0, 0],
    "none at all": [-1, -1],
    "one row": [1],
    "one row without": [-1],
    "no row": [],
}


def inputs(rows, length=3, ranks=(32, 1, 5, 2), d_in=6, d_out=7, dtype=torch.float64):
    """y, x and each adapter's own A and B, with gradients asked for everywhere."""
    torch.manual_seed(0)
    shapes = [(len(rows), length, d_out), (len(rows), length, d_in)]
    shapes += [shape for rank in ranks for shape in ((rank, d_in), (d_out, rank))]
    y, x, *factors = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return y, x, factors[::2], factors[1::2]


def mixed(way, y, x, a, b, rows):
    """The op on the adapters padded to one rank."""
    stack_a = pad_sequence(a, batch_first=True)
    stack_b = pad_sequence([b.mT for b in b], batch_first=True).mT
    rows, scale = torch.tensor(rows, dtype=torch.long), torch.tensor(SCALES[: len(a)], dtype=a[0].dtype)
    return WAYS[way](y, x, stack_a, stack_b, rows, scale)


def by_hand(y, x, a, b, rows):
    """Each row with the matrix scale * B A of its adapter alone."""
    out = [y[i] + (x[i] @ (SCALES[n] * (b[n] @ a[n])).mT if n >= 0 else 0) for i, n in enumerate(rows)]
    return torch.stack(out) if out else y * 1.0


@WAY
def test_hand_computed_values(way):
    """x = (1, 2), A = (3, 4), B = (1, -1)^T, scale 0.5: A x = 11 update (5.5, -5.5), in the first row only."""
    x, y = torch.tensor([[[1.0, 2.0]]] * 2), torch.tensor([[[10.0, 20.0]]] * 2)
    a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0], [-1.0]]])
    out = WAYS[way](y, x, a, b, torch.tensor([0, -1]), torch.tensor([0.5]))
    assert out.tolist() == [[[15.5, 14.5]], [[10.0, 20.0]]]


@WAY
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("length", [1, 4, 0])
def test_output_and_all_gradients(way, rows, length):
    y, x, a, b = inputs(rows, length)
    out, expected = mixed(way, y, x, a, b, rows), by_hand(y, x, a, b, rows)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    wanted = (y, x, *a, *b)
    ours = torch.autograd.grad(out, wanted, grad)  # also of adapters that no row uses: zeros, never None
    truth = torch.autograd.grad(expected, wanted, grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, truth)


@WAY
def test_rank_32_next_to_rank_1(way):
    """A kernel of another project was wrong for one rank among several: each of many ranks beside its neighbours."""
    ranks, rows = (1, 32, 31, 33), [1, 0, 3, 2, 1, 0]
    y, x, a, b = inputs(rows, ranks=ranks, d_in=40, d_out=36)
    out, expected = mixed(way, y, x, a, b, rows), by_hand(y, x, a, b, rows)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(t.square().sum(), (x, *a, *b)) for t in (out, expected)]
    torch.testing.assert_close(*grads)


@WAY
def test_adapters_in_another_order_change_nothing(way):
    rows = [2, 0, -1, 3, 1, 2]
    y, x, a, b = inputs(rows)
    stack_a, stack_b = pad_sequence(a, batch_first=True), pad_sequence([b.mT for b in b], batch_first=True).mT
    rows, scale = torch.tensor(rows), torch.tensor(SCALES, dtype=torch.float64)
    before = WAYS[way](y, x, stack_a, stack_b, rows, scale)
    order = torch.tensor([3, 1, 0, 2])
    renamed = torch.where(rows < 0, rows, order.argsort()[rows])
    torch.testing.assert_close(WAYS[way](y, x, stack_a[order], stack_b[order], renamed, scale[order]), before)


@WAY
def test_non_contiguous_input_and_gradient(way):
    rows = [1, -1, 0]
    y, x, a, b = inputs(rows, length=4)
    y, x = (t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (y, x))
    assert not x.is_contiguous() and not y.is_contiguous()
    grad = torch.randn(7, 3, 4, dtype=torch.float64).permute(1, 2, 0)
    out, expected = mixed(way, y, x, a, b, rows), by_hand(y, x, a, b, rows)
    torch.testing.assert_close(out, expected)
    wanted = (y, x, *a[:2], *b[:2])
    torch.testing.assert_close(torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad))


@WAY
def test_gradcheck_of_all_but_the_rows(way):
    rows = torch.tensor([1, -1, 0, 1])
    y, x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((4, 2, 3), (4, 2, 4), (2, 2, 4), (2, 3, 2)))
    tensors = [t.requires_grad_() for t in (y, x, a, b, torch.tensor([1.5, -2.0], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda y, x, a, b, scale: WAYS[way](y, x, a, b, rows, scale), tensors)


@WAY
def test_a_broken_adapter_spoils_its_own_rows_only(way):
    rows = [0, -1, 1]
    y, x, a, b = inputs(rows, ranks=(2, 2))
    a[0].data.fill_(torch.nan)
    b[0].data.fill_(torch.inf)
    out = mixed(way, y, x, a, b, rows)
    assert out[0].isnan().all()
    assert torch.equal(out[1], y[1])
    torch.testing.assert_close(out[2], by_hand(y, x, a, b, rows)[2])
    (grad,) = torch.autograd.grad(out[1:].sum(), x)
    assert grad[1:].isfinite().all()


@WAY
def test_the_inputs_are_left_alone(way):
    rows = [1, -1]
    y, x, a, b = inputs(rows)
    before = y.detach().clone(), x.detach().clone()
    with torch.no_grad():
        mixed(way, y, x, a, b, rows)
    assert torch.equal(y, before[0]) and torch.equal(x, before[1])


@WAY
def test_float32_adapters_on_a_bfloat16_base(way):
    """The update is made in float32 and the sum rounded once; the truth is float64 from the same bfloat16 values."""
    rows = [0, 1, -1, 2]
    y, x, a, b = inputs(rows, length=16, dtype=torch.float32)
    y, x = (t.detach().bfloat16().requires_grad_() for t in (y, x))
    exact = by_hand(y.double(), x.double(), [t.double() for t in a], [t.double() for t in b], rows)
    out = mixed(way, y, x, a, b, rows)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # half a step of 8 significant bits
    grads = torch.autograd.grad(out.float().sum(), (y, x, a[0], b[0]))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@WAY
def test_autocast_runs_in_bfloat16_with_float32_gradients(way):
    rows = [0, 1, -1, 2]
    y, x, a, b = inputs(rows, dtype=torch.float32)
    exact = by_hand(y, x, a, b, rows)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed(way, y.bfloat16(), x, a, b, rows)
        kept = mixed(way, y, x, a, b, rows)
    assert out.dtype == torch.bfloat16 and kept.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=2**-6, atol=0.5)  # a sum of 32 products of bfloat16 numbers
    assert torch.equal(kept[2], y[2])  # a float32 output of the base is not rounded
    wanted = (x, *a[:3], *b[:3])
    grads, truth = (torch.autograd.grad(t.float().sum(), wanted) for t in (out, exact))
    for ours, exact in zip(grads, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_gradient_checkpointing_changes_nothing():
    rows = [2, -1, 0]
    y, x, a, b = inputs(rows)
    wanted = (y, x, a[0], b[0])
    direct = torch.autograd.grad(mixed("padded", y, x, a, b, rows).square().sum(), wanted)
    recomputed = checkpoint(mixed, "padded", y, x, a, b, rows, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), wanted), direct, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("batch_size, length", [(0, 2), (1, 1), (3, 1), (3, 4)])
def test_gathered_matrices(backend, batch_size, length):
    """`lora_rows`: row i with its own a[i] and b[i]."""
    torch.manual_seed(0)
    shapes = [(batch_size, length, 7), (batch_size, length, 6), (batch_size, 3, 6), (batch_size, 7, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    y, x, a, b = tensors
    with use_backend(backend):
        out = lora_rows(y, x, a, b)
    expected = y + torch.einsum("btd,brd,bor->bto", x, a, b)
    torch.testing.assert_close(out, expected)
    if batch_size:
        grads = [torch.autograd.grad(t.square().sum(), tensors) for t in (out, expected)]
        torch.testing.assert_close(*grads)


@WAY
@pytest.mark.parametrize("rows", [[0, 4], [4, 0, 1], [-2, 1]])
def test_an_adapter_that_does_not_exist(way, rows):
    with pytest.raises((ValueError, IndexError), match=r"rows from .*0\.\.3, or -1 for none|out of range"):
        mixed(way, *inputs(rows), rows)


def test_the_chosen_backend_runs():
    rows = [0]
    y, x, a, b = inputs(rows)
    arguments = (y, x, a[0][None], b[0][None], torch.tensor(rows), torch.ones(1, dtype=torch.float64))
    with use_backend("reference"):
        assert "IndexAdd" in str(lora_gather(*arguments).grad_fn.next_functions)
    assert "Baddbmm" in str(lora_gather(*arguments).grad_fn)
