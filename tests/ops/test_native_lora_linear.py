"""Our kernels of one adapter's update, with dropout computed from a seed, against float64: on the CPU."""

import jaxtyping
import pytest
import torch
from lora_cases import CASES, DROPOUTS, TYPES, Case, check_linear, in_float64
from torch.utils.checkpoint import checkpoint

from minillm import ops
from minillm.peft import LoRALinear

pytestmark = pytest.mark.usefixtures("native_library")
SEED = torch.tensor(2**40 + 77)
EVERY_TYPE = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)


def native(operation, *arguments):
    with ops.use_backend("native"):
        return operation(*arguments)


@EVERY_TYPE
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_all_gradients(case, dropout, types):
    check_linear(case, types, dropout)


@pytest.mark.parametrize("types", [TYPES["float32"], TYPES["bfloat16"]])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_same_numbers_drop_out_as_in_the_definition(p, types):
    """With A and B the identity, the update is the dropped x."""
    x, one, zeros = torch.randn(70, 40).to(types[0]), torch.eye(40, dtype=types[1]), torch.zeros(70, 40).to(types[0])
    dropped = native(ops.lora, zeros, x, one, one, 1.0, p, SEED)
    assert torch.equal(dropped == 0, ops.dropout(x, p, SEED) == 0)
    torch.testing.assert_close(dropped, ops.dropout(x, p, SEED))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("needed", range(1, 32))
def test_gradients_for_every_subset_of_inputs(needed, dropout):
    tensors, grad = Case((6,)).tensors(torch.float32, torch.float32)
    tensors = [t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(tensors)]
    wanted = [t for t in tensors if t.requires_grad]
    y = native(ops.lora_linear, *tensors, 0.75, dropout, SEED)
    expected = ops.lora_linear.implementations["reference"](*tensors, 0.75, dropout, SEED)
    torch.testing.assert_close(*(torch.autograd.grad(t, wanted, grad) for t in (y, expected)), rtol=1e-4, atol=1e-4)


def test_only_a_seed_is_kept_of_dropout():
    """Besides parameters x itself and u, R numbers for each row; no mask, no dropped copy of x, and no x for nobody."""
    (x, weight, bias, a, b), _ = Case((64,), 40, 24, 4).tensors(torch.float32, torch.float32)
    frozen = [weight.detach(), bias.detach()]

    def held(a, b):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            native(ops.lora_linear, x, *frozen, a, b, 1.0, 0.1, SEED)
        parameters = {t.data_ptr() for t in (*frozen, a, b)}
        return sorted(t.numel() for t in kept if t.data_ptr() not in parameters)

    assert held(a, b) == [1, 4 * 64, 40 * 64]
    assert held(a.detach(), b.detach()) == [1, 4 * 64]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_threads_do_not_change_a_bit(dropout):
    tensors, grad = Case((700,), 520, 600, 8).tensors(torch.float32, torch.float32)
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        x, _, _, a, b = tensors
        y = torch.ones(700, 600)
        out = native(ops.lora, y, x, a, b, 0.75, dropout, SEED)
        found.append((out, *torch.autograd.grad(out, (x, a, b), grad)))
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize(("dropout", "seed"), [(0.0, None), (0.3, SEED)])
def test_torch_accepts_the_operations(differentiable, dropout, seed):
    y, x, a, b = (torch.randn(s).requires_grad_(differentiable) for s in ((6, 7), (6, 12), (3, 12), (7, 3)))
    torch.library.opcheck(torch.ops.minillm.lora.default, (y, x, a, b, 0.5, dropout, seed))
    with torch.no_grad():
        _, u = torch.ops.minillm.lora(y, x, a, b, 0.5, dropout, seed)
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            for base in (torch.randn(6, 12), None):
                given = torch.randn(6, 7), base, x.detach(), a.detach(), b.detach(), u, 0.5, dropout, seed
                torch.library.opcheck(torch.ops.minillm.lora_backward.default, (*given, *needs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["lora", "lora_linear"])
def test_compiled_without_a_break(name, dropout, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of shapes cannot be compiled
    (x, weight, bias, a, b), grad = Case((2, 5)).tensors(torch.float32, torch.float32)
    weight, bias = weight.detach(), bias.detach()
    given = (x, weight, bias) if name == "lora_linear" else (torch.randn(2, 5, 29), x)
    operation = getattr(ops, name)

    def run(x, a, b, seed):
        start = (x, *given[1:]) if name == "lora_linear" else (given[0], x)
        return operation(*start, a, b, 0.5, dropout, seed).relu()

    with ops.use_backend("native"):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        pair = compiled(x, a, b, SEED), run(x, a, b, SEED)
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(*(torch.autograd.grad(y, (x, a, b), grad) for y in pair))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    """In bfloat16, gradients float32; what kernels do not know runs in PyTorch, or is an error where asked for."""
    tensors, grad = Case((40,)).tensors(torch.float32, torch.float32)
    x, weight, bias, a, b = tensors
    with torch.autocast("cpu", low):
        if low == torch.float16:
            with pytest.raises(ValueError, match="autocast to float16"):
                native(ops.lora_linear, *tensors, 0.75, 0.3, SEED)
            return
        y = native(ops.lora_linear, *tensors, 0.75, 0.3, SEED)
        beside = native(ops.lora, torch.nn.functional.linear(x, weight, bias), x, a, b, 0.75, 0.3, SEED)
    for result in (y, beside):
        precise = in_float64(tensors)
        exact = Case((40,), seed=SEED.item()).exact(precise, 0.3)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, rtol=2**-6, atol=0.1)
        grads = torch.autograd.grad(result, tensors, grad.bfloat16())
        assert all(g.dtype == torch.float32 for g in grads)
        for ours, truth in zip(grads, torch.autograd.grad(exact, precise, grad.double()), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=2**-5, atol=0.3)


def test_what_no_kernel_takes():
    (x, weight, bias, a, b), _ = Case((6,)).tensors(torch.float32, torch.float32)
    for arguments, reason in (
        ((x.double(), weight.double(), None, a.double(), b.double()), "not float64"),
        ((x, weight, bias, a.bfloat16(), b.bfloat16()), "bfloat16 factors on a float32 base"),
        ((x, weight, bias, a, b.bfloat16()), "factors of different types"),
        ((x, weight.bfloat16(), None, a, b), "of different types"),
    ):
        with pytest.raises(ValueError, match=reason):
            native(ops.lora_linear, *arguments, 1.0)
    with pytest.raises(ValueError, match="a probability"):
        native(ops.lora_linear, x, weight, bias, a, b, 1.0, 1.0, SEED)
    with pytest.raises(ValueError, match="without a seed"):
        native(ops.lora, torch.ones(6, 29), x, a, b, 1.0, 0.5)
    y, operation = torch.ones(6, 29), torch.ops.minillm.lora
    for arguments, reason in (
        ((y[:5], x, a, b, 1.0, 0.0, None), "y and its gradient"),
        ((y, x[:, :32], a, b, 1.0, 0.0, None), "R, Din"),
        ((y, x, a, b[:, :3], 1.0, 0.0, None), "R, Din"),
        ((y.bfloat16(), x, a, b, 1.0, 0.0, None), "of one type"),
        ((y, x, a, b, 1.0, 0.5, None), "above 0 its seed"),
        ((y, x, a, b, 1.0, 1.0, SEED), "a dropout of 0 to 1"),
        ((y, x, a, b, 1.0, 0.5, SEED.int()), "a seed of int64"),
    ):
        with pytest.raises(RuntimeError, match=f"minillm kernels: .*{reason}"):
            operation(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))


def test_auto_leaves_to_torch_what_it_does_as_fast():
    def refusals(rows, dropout, rank=8, dtype=torch.float32, base=False):
        x, y = torch.randn(rows, 64, dtype=dtype), torch.randn(rows, 64, dtype=dtype)
        a, b = torch.randn(rank, 64), torch.randn(64, rank)
        operation = ops.lora_linear if base else ops.lora
        operation.refused.clear()
        with ops.use_backend("auto"):
            ops.lora_linear(x, y[:64], None, a, b, 1.0, dropout, SEED) if base else ops.lora(
                y, x, a, b, 1.0, dropout, SEED
            )
        (reason,) = operation.refused or [""]
        operation.refused.clear()
        return reason

    assert "fewer than 8192 numbers" in refusals(100, 0.1)
    assert "fewer than 65536 numbers" in refusals(1000, 0.0)
    assert "a rank above 32" in refusals(2000, 0.0, rank=40)
    assert "more than 4 rows" in refusals(2000, 0.0, base=True)
    for arguments in ({"dropout": 0.1, "rank": 40}, {"dropout": 0.0}, {"dropout": 0.1, "base": True}):
        assert refusals(2000, **arguments) == ""
    assert refusals(2000, 0.0, dtype=torch.bfloat16, base=True) == ""


# The layer


def layer(dropout=0.3, base=None, rank=3):
    made = LoRALinear(base or torch.nn.Linear(40, 24), rank, 6.0, dropout=dropout).train()
    torch.nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("rows", [(6,), (2, 150)])
def test_the_layer_draws_one_seed_and_drops_as_it_says(rows):
    made, x = layer(), torch.randn(*rows, 40)
    torch.manual_seed(9)
    y = native(made, x)
    torch.manual_seed(9)
    seed = ops.dropout_seed()
    update = made.scale * (ops.dropout(x, 0.3, seed) @ made.lora_A.mT) @ made.lora_B.mT
    torch.testing.assert_close(y, made.base(x) + update, rtol=1e-4, atol=1e-4)
    again = native(made, x)
    assert not torch.equal(y, again)
    torch.manual_seed(9)
    assert torch.equal(native(made, x), y)
    assert torch.equal(native(made.eval(), x), native(made, x))


def test_the_layer_beside_any_base():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    made, x = layer(base=Doubled(40, 24)), torch.randn(6, 40)
    torch.manual_seed(9)
    y = native(made, x)
    torch.manual_seed(9)
    update = made.scale * (ops.dropout(x, 0.3, ops.dropout_seed()) @ made.lora_A.mT) @ made.lora_B.mT
    torch.testing.assert_close(y, made.base(x) + update, rtol=1e-4, atol=1e-4)


def test_a_restored_generator_repeats_the_step_and_so_does_checkpointing():
    made, x = layer(), torch.randn(300, 40, requires_grad=True)

    def step(run):
        torch.manual_seed(4)
        loss = native(run, x).square().sum()
        with ops.use_backend("native"):
            return loss, *torch.autograd.grad(loss, (x, made.lora_A, made.lora_B))

    first = step(made)
    for other in (step(made), step(lambda x: checkpoint(made, x, use_reentrant=False))):
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_layer_compiles_without_a_break(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    made, x = layer(), torch.randn(300, 40)
    with ops.use_backend("native"):
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.manual_seed(4)
        y = compiled(x)
        torch.manual_seed(4)
        torch.testing.assert_close(y, made(x))
        torch.manual_seed(5)
        assert not torch.equal(compiled(x), y)


def test_the_layer_draws_as_nn_dropout_where_no_kernel_runs():
    for dtype, backend in ((torch.float32, "torch"), (torch.float64, "auto")):
        made, x = layer().to(dtype), torch.randn(300, 40, dtype=dtype)
        torch.manual_seed(4)
        with ops.use_backend(backend):
            y = made(x)
        torch.manual_seed(4)
        dropped = torch.nn.functional.dropout(x, 0.3)
        torch.testing.assert_close(y, made.base(x) + made.scale * (dropped @ made.lora_A.mT) @ made.lora_B.mT)
