"""linear_cross_entropy against torch's linear and cross_entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.ops import linear_cross_entropy, use_backend

pytestmark = pytest.mark.parametrize("backend", ["reference", "torch"])


def inputs(n=7, d=5, v=11, *, dtype=torch.float64, bias=False, ignored=(1, 4)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    b = torch.randn(v, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(v, (n,), generator=generator)
    targets[[i for i in ignored if i < n]] = -100
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)]
    return *leaves, targets


class Operations(TorchDispatchMode):
    """Records the operations that run and the largest number of elements that one of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.largest = max([self.largest, *sizes])
        return result


def truth(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, [x for x in leaves if x is not None], grad_outputs=torch.tensor(0.37).to(loss))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n, chunk", [(1, 1), (7, 1), (7, 3), (7, 5), (7, 7), (7, 256), (12, 4)])
def test_loss_and_gradients_are_those_of_torch(backend, n, chunk, bias):
    *leaves, targets = inputs(n, bias=bias)
    with use_backend(backend):
        loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], chunk=chunk)
        ours = gradients(loss, *leaves)
    expected = truth(*leaves, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradients(expected, *leaves), rtol=1e-12, atol=1e-12)


def test_gradcheck(backend):
    hidden, weight, bias, targets = inputs(bias=True)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk=3), (hidden, weight, bias)
        )


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
def test_only_what_is_trained_receives_a_gradient(backend, trained):
    hidden, weight, bias, targets = inputs(bias=True)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=2)
    expected = truth(hidden, weight, bias, targets)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (trained != "nothing")
    if loss.requires_grad:
        torch.testing.assert_close(gradients(loss, leaves[trained]), gradients(expected, leaves[trained]))


def test_without_grad_mode_there_is_a_loss_and_no_graph(backend):
    hidden, weight, _, targets = inputs()
    with use_backend(backend), torch.no_grad(), Operations() as run:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert run.names.count("aten.mm.default") + run.names.count("aten.mm.out") == 1  # no product for gradients
    torch.testing.assert_close(loss, truth(hidden, weight, None, targets))


def test_two_backward_passes_through_one_graph_agree(backend):
    hidden, weight, _, targets = inputs()
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [hidden, weight])
    torch.testing.assert_close(list(first), kept)  # the second pass must not write into the first's result
    torch.testing.assert_close([3 * g for g in second], kept)


def test_a_batch_of_ignored_targets_gives_zero(backend):
    *leaves, targets = inputs(bias=True)
    with use_backend(backend):
        loss = linear_cross_entropy(*leaves[:2], torch.full_like(targets, -100), bias=leaves[2])
        loss.backward()
    assert loss == 0
    assert all(leaf.grad.count_nonzero() == 0 for leaf in leaves)


def test_an_unlikely_target_has_a_finite_loss(backend):
    """Logits +200 and -200: p = exp(-400) is 0 in float32, but -log p is 400."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[200.0], [-200.0]])
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss == 400.0
    assert hidden.grad.item() == 400.0  # (1 - 0) * 200 + (0 - 1) * -200


def test_float32_error_stays_at_its_rounding(backend):
    hidden, weight, _, targets = inputs(300, 16, 50, dtype=torch.float32)
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=64)
        ours = gradients(loss, hidden, weight)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = truth(*exact, None, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for mine, true in zip(ours, gradients(expected, *exact), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_and_float32_sums(backend, autocast):
    """bfloat16 inputs, or float32 inputs under autocast: dtypes follow the inputs, values within bfloat16's rounding.

    A logit of size 4 is rounded to 2^-8 * 4 / 2; the tolerances are about three times what that does to a loss.
    """
    hidden, weight, bias, targets = inputs(300, 16, 50, dtype=torch.float32, bias=True)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    dtype = torch.float32 if autocast else torch.bfloat16
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], chunk=64)
        loss.backward()
    expected = truth(*exact, targets)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=3e-3, atol=0)
    for mine, true in zip(leaves, exact, strict=True):
        assert mine.grad.dtype == dtype
        error = (mine.grad.double() - true.grad).norm() / true.grad.norm()
        assert error < 0.02


def test_autocast_rounds_what_enters_the_products(backend):
    hidden, weight, _, targets = inputs(300, 16, 50, dtype=torch.float32)
    with use_backend(backend):
        rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), rounded, rtol=1e-6, atol=0)


def test_float16_sums_over_many_rows_do_not_stagnate(backend):
    """8192 equal rows, each adding 0.5 to one weight's gradient; float16 itself cannot count by ones past 2048."""
    hidden, weight = torch.ones(8192, 1).half(), torch.zeros(2, 1).half().requires_grad_()
    with use_backend(backend):
        linear_cross_entropy(hidden, weight, torch.zeros(8192, dtype=torch.int64), chunk=2).backward()
    assert weight.grad.tolist() == [[-4096.0], [4096.0]]


def test_strided_inputs(backend):
    hidden, weight, _, targets = inputs(8, 6, 10)
    expected = gradients(truth(hidden, weight, None, targets), hidden, weight)
    wide = torch.stack([hidden.detach(), hidden.detach() * 9], dim=-1)  # every other number is the hidden state
    views = wide[..., 0].requires_grad_(), weight.detach().T.contiguous().T.requires_grad_()
    assert not any(view.is_contiguous() for view in views)
    with use_backend(backend):
        loss = linear_cross_entropy(*views, targets.repeat_interleave(2)[::2], chunk=3)
        torch.testing.assert_close(gradients(loss, *views), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist_at_once(backend, dtype):
    n, d, v, chunk = 64, 4, 100, 8
    hidden, weight, bias, targets = inputs(n, d, v, dtype=dtype, bias=True)
    with use_backend(backend), Operations() as run:
        linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk).backward()
    assert run.largest == (chunk * v if backend == "torch" else n * v)  # the definition shows that it is noticed


def test_wrong_arguments_are_named_together(backend):
    hidden, weight, _, targets = inputs()
    targets[:3] = torch.tensor([11, -1, 999])
    message = (
        r"\(8,\) targets for \(7, 5\) hidden states.*3 targets outside the vocabulary of 11 \(such as -1, 11, 999\): "
        r"ids run from 0 to 10, and -100 marks.*chunk=0: at least one row"
    )
    with use_backend(backend), pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, torch.cat([targets, targets[-1:]]), chunk=0)
