"""IncreLoRA against its formulas in float64, torch's own AdamW and schedules, and Hugging Face peft."""

import copy
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_linear_schedule_with_warmup

from minillm.config import from_dict, to_dict
from minillm.peft import LoraConfig, auxiliary_loss, load_adapter, merge, num_parameters, save_adapter, tune, unload
from minillm.peft.increlora import IncreLoraConfig, export
from minillm.peft.increlora_allocator import RankAllocator
from minillm.peft.increlora_linear import START, IncreLoRALinear
from minillm.peft.record import tunings_of
from minillm.training import EarlyStopping, Evaluate, Loss, TrainConfig, Trainer
from minillm.training.distributed import sum_over_processes
from minillm.training.rank_growth import RankGrowth


def layer(rank=2, max_rank=5, reserve=2, *, alpha=3.0, dropout=0.0, conv1d=False):
    """A layer of 5 -> 7 in float64 with random components, as after training."""
    torch.manual_seed(0)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(7, 5).double()
    else:
        base = nn.Linear(5, 7, dtype=torch.float64)
    base.requires_grad_(False)
    made = IncreLoRALinear(base, rank, alpha, max_rank=max_rank, reserve=reserve, dropout=dropout)
    with torch.no_grad():
        for parameter in (made.lora_A, made.lora_B, made.lora_E):
            parameter.normal_()
    return made


def by_hand(layer, x, rank):
    """W x + b + alpha / rank * sum_i E_i B_i (A_i . x), one component after the other."""
    y = layer.base(x)
    for i in range(rank):
        y = y + layer.alpha / rank * layer.lora_E[i] * (x @ layer.lora_A[i])[..., None] * layer.lora_B[:, i]
    return y


class Linears(nn.Module):
    """`sizes` linear layers beside one another, each small; what they compute does not matter."""

    def __init__(self, count=4, size=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(count))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def growing(count=4, *, steps=1000, size=6, optimizer=None, attach=None, dtype=torch.float32, **fields):
    """(allocator, its layers, `step(scores)`: one optimizer step without gradients, with these importances)"""
    torch.manual_seed(0)
    model = Linears(count, size).to(dtype)
    targets = tuple(f"layers.{i}" for i in range(count))
    tune(model, IncreLoraConfig(**{"targets": targets, "warmup": 0, "interval": 1, "winners": 1} | fields))
    allocator = RankAllocator(model)
    layers = list(model.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    allocator.attach(optimizer, steps=steps, **(attach or {}))

    def step(scores):
        for each, score in zip(layers, scores, strict=True):
            each.importance = torch.tensor(float(score))
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    return allocator, layers, step


# ---------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rows", [(1,), (6,), (1, 1), (2, 3)])
def test_is_the_formula(rows, conv1d):
    ours = layer(conv1d=conv1d)
    x = torch.randn(*rows, 5, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), by_hand(ours, x, 2))


def test_is_the_formula_for_inputs_that_are_not_contiguous():
    ours = layer()
    for x in (torch.randn(5, 6).double().t(), torch.randn(3, 2, 5).double().transpose(0, 1)):
        assert not x.is_contiguous()
        torch.testing.assert_close(ours(x), by_hand(ours, x, 2))


def test_starts_as_identity_because_E_is_zero():
    """Neither A nor B is zero, or no gradient would ever reach E."""
    base = nn.Linear(5, 7)
    ours, x = IncreLoRALinear(base, 2, 16.0, max_rank=4), torch.randn(8, 5)
    assert torch.equal(ours.train()(x), base(x)) and torch.equal(ours.eval()(x), base(x))
    assert ours.lora_E.tolist() == pytest.approx([0, 0, START, START])
    assert ours.lora_A.count_nonzero() == 20 and ours.lora_B.count_nonzero() == 28


def test_start_is_of_the_published_size():
    ours = IncreLoRALinear(nn.Linear(400, 400), 1, 16.0, max_rank=20)
    for parameter in (ours.lora_A, ours.lora_B):
        assert abs(parameter.std().item() - 0.02) < 0.001 and abs(parameter.mean().item()) < 0.001  # 8000 samples


def test_gradients_are_those_of_the_formula():
    ours = layer()
    leaves = (ours.lora_A, ours.lora_B, ours.lora_E)
    results = []
    for run in (ours, lambda x: by_hand(ours, x, 2)):
        x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        a, b, e, x = torch.autograd.grad(run(x).square().sum(), (*leaves, x))
        results.append((a[:2], b[:, :2], e, x))  # the reserve has gradients too, seen by nothing below it
    torch.testing.assert_close(results[0], results[1])


def test_the_reserve_learns_and_is_not_heard():
    """Advance learning: components 2 and 3 have the gradients of E = 1e-5; component 4 waits; E learns in none."""
    ours = layer()
    x = torch.randn(4, 5, dtype=torch.float64)
    y = ours(x)
    g = torch.randn_like(y)
    a, b, e = torch.autograd.grad(y, (ours.lora_A, ours.lora_B, ours.lora_E), g)
    speaking = 3.0 / 2 * START * (x @ ours.lora_A[2:4].t()) @ ours.lora_B[:, 2:4].t()
    expected_a, expected_b = torch.autograd.grad(speaking, (ours.lora_A, ours.lora_B), g)
    torch.testing.assert_close((a[2:], b[:, 2:]), (expected_a[2:], expected_b[:, 2:]))
    assert a[3].count_nonzero() and b[:, 3].count_nonzero()
    assert not a[4].count_nonzero() and not b[:, 4].count_nonzero() and not e[2:].count_nonzero()


def test_a_component_more_makes_all_others_smaller():
    """Toy mistake: a scale that stays alpha / (first rank). The update is alpha / rank times the sum."""
    ours, x = layer(rank=2), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        ours.lora_E[2] = 0.0
        before = ours(x) - ours.base(x)
        ours.extent.copy_(torch.tensor([3, 5]))
        torch.testing.assert_close(ours(x) - ours.base(x), 2 / 3 * before)


def test_dropout_is_on_the_branch_only():
    ours = layer(dropout=0.5)
    x = torch.randn(8, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), by_hand(ours, x, 2))
    torch.manual_seed(3)
    y = ours.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, by_hand(ours, dropped, 2) - ours.base(dropped) + ours.base(x))


def test_merged_weight():
    for conv1d in (False, True):
        ours, x = layer(conv1d=conv1d), torch.randn(4, 5, dtype=torch.float64)
        w = ours.weight.t() if conv1d else ours.weight
        torch.testing.assert_close(x @ w.t() + ours.bias, ours(x))


# ----------------------------------------------------------------------------------------------------- the importance


def importance_by_autograd(layer, x, g, rank=2):
    """sum |dW * dL/d(dW)| / sqrt(numel), the gradient from autograd with dW as a leaf."""
    update = layer.alpha / rank * (layer.lora_B[:, :rank] * layer.lora_E[:rank]) @ layer.lora_A[:rank]
    update = update.detach().requires_grad_()
    y = layer.base(x) + x @ update.t()
    (gradient,) = torch.autograd.grad(y, update, g)
    return (update * gradient).abs().sum() / math.sqrt(7 * 5)


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_importance_is_what_autograd_gives(rows):
    ours = layer()
    ours.watched = True
    x, g = torch.randn(*rows, 5, dtype=torch.float64), torch.randn(*rows, 7, dtype=torch.float64)
    ours(x).backward(g)
    torch.testing.assert_close(ours.importance, importance_by_autograd(ours, x, g).detach())
    ours(x).backward(g)  # a second batch of the same step adds to it
    torch.testing.assert_close(ours.importance, 2 * importance_by_autograd(ours, x, g).detach())


def test_importance_is_of_the_weight_not_of_the_output():
    """Toy mistake: sum |y * dL/dy| is another number; with two tokens that cancel out, it is not even 0 when S is."""
    ours = layer()
    ours.watched = True
    x = torch.randn(1, 5, dtype=torch.float64).repeat(2, 1)
    g = torch.randn(1, 7, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ours(x).backward(g)
    assert ours.importance.item() == pytest.approx(0, abs=1e-12)


def test_importance_is_measured_once_with_gradient_checkpointing(decoder, tokens, loss_fn, perturb):
    tune(decoder, IncreLoraConfig(alpha=5.0))
    perturb(decoder)
    layers = [wrapper for _, wrapper in tunings_of(decoder)["default"].wrappers]
    found = []
    for decoder.gradient_checkpointing in (False, True):
        for each in layers:
            each.watched, each.importance = True, 0.0
        loss_fn(decoder, tokens).value.backward()
        found.append(torch.stack([each.importance for each in layers]))
    assert (found[0] > 0).all()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_nothing_is_measured_without_gradients_or_in_eval_mode():
    ours = layer()
    ours.watched = True
    x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
    ours.eval()(x).sum().backward()
    assert ours.importance == 0.0


# -------------------------------------------------------------------------------------------------- the orthogonality


def test_orthogonality_is_over_all_components_together():
    """Toy mistake (the published code): each added component by itself. Two equal unit rows then cost nothing."""
    ours = layer(rank=1, max_rank=4, reserve=1)
    with torch.no_grad():
        ours.lora_A.zero_()
        ours.lora_A[:2, 0] = 1.0  # the component that speaks and the one in reserve, both (1, 0, 0, 0, 0)
        ours.lora_B.zero_()
        ours.lora_B[0, 0] = ours.lora_B[1, 1] = 1.0  # orthogonal
    # A A^T - I = [[0, 1], [1, 0]], of norm sqrt 2, though both rows have the length 1; the waiting rows cost nothing
    torch.testing.assert_close(ours.orthogonality(), torch.tensor([math.sqrt(2), 0.0], dtype=torch.float64))


def test_penalty_is_the_mean_over_the_matrices(decoder, perturb):
    tune(decoder, IncreLoraConfig(rank=2, target_rank=3, orthogonality=0.3))
    perturb(decoder)
    norms = []
    for _, wrapper in tunings_of(decoder)["default"].wrappers:
        a, b = wrapper.lora_A[:3], wrapper.lora_B[:, :3]
        norms += [torch.linalg.matrix_norm(p - torch.eye(3)) for p in (a @ a.t(), b.t() @ b)]
    torch.testing.assert_close(auxiliary_loss(decoder), 0.3 * sum(norms) / len(norms))
    auxiliary_loss(decoder).backward()
    assert wrapper.lora_A.grad[:3].count_nonzero() and not wrapper.lora_A.grad[3:].count_nonzero()


def test_no_penalty():
    model = Linears()
    tune(model, IncreLoraConfig(targets=("layers.0",), orthogonality=0))
    assert auxiliary_loss(model) is None


# ---------------------------------------------------------------------------------------------------------- the growth


def test_moving_averages():
    """I = b1 I + (1 - b1) S; then U = b2 U + (1 - b2) |S - I| with the new I; the score is I U."""
    allocator, _, step = growing(2, beta1=0.6, beta2=0.9, interval=100)
    average, deviation = [0.0, 0.0], [0.0, 0.0]
    for scores in ([1.0, 2.0], [4.0, 1.0], [0.5, 0.0]):
        step(scores)
        average = [0.6 * i + 0.4 * s for i, s in zip(average, scores, strict=True)]
        deviation = [0.9 * u + 0.1 * abs(s - i) for u, s, i in zip(deviation, scores, average, strict=True)]
    assert allocator.sensitivity.tolist() == pytest.approx(average, rel=1e-12)
    assert allocator.scores().tolist() == pytest.approx(
        [i * u for i, u in zip(average, deviation, strict=True)], rel=1e-12
    )


def test_the_most_important_layers_grow_when_it_is_time():
    """Warm-up 3, every 2 steps: the first growth is after step 4, the next after step 6."""
    allocator, layers, step = growing(4, target_rank=2, winners=2, warmup=3, interval=2)
    seen = []
    for _ in range(6):
        step([1.0, 3.0, 2.0, 0.5])
        seen.append((list(allocator.ranks.values()), allocator.grew()))
    start, first, last = [1, 1, 1, 1], [1, 2, 2, 1], [1, 3, 3, 1]
    assert seen == [(start, False)] * 3 + [(first, True), (first, False), (last, True)]
    assert allocator.complete and [int(each.extent[0]) for each in layers] == last


@pytest.mark.parametrize(
    "count, rank, target, winners, reserve, rounds",
    [
        (4, 1, 2, 1, 1, 4),
        (4, 1, 2, 3, 1, 2),  # 4 ranks to give, 3 at a time
        (3, 1, 3, 2, 4, 1),  # 6 ranks to give, 8 at a time
        (5, 2, 3, 1, 3, 2),  # 5 ranks, 3 at a time
        (4, 2, 2, 2, 2, 0),  # nothing to give
        (2, 1, 4, 5, 2, 2),  # more winners than layers: 6 ranks, 4 at a time
    ],
)
def test_the_budget_is_met_exactly(count, rank, target, winners, reserve, rounds):
    """Toy mistake (the published code): the last round goes beyond the budget, and then never stops measuring."""
    allocator, layers, step = growing(
        count, rank=rank, target_rank=target, winners=winners, reserve=reserve, max_rank=6, steps=rounds + 1
    )
    totals = [sum(allocator.ranks.values())]
    for _ in range(rounds):
        assert not allocator.complete
        step(range(count))
        totals.append(sum(allocator.ranks.values()))
    assert allocator.complete and totals == sorted(totals) and totals[-1] == target * count
    assert not any(each.watched for each in layers)
    assert all(each.extent[0] == each.extent[1] for each in layers)  # the reserves are gone


def test_full_layers_pass_their_win_on():
    allocator, _, step = growing(3, target_rank=3, max_rank=4, winners=2, reserve=2)
    step([1, 2, 3])
    assert list(allocator.ranks.values()) == [1, 3, 3]
    step([1, 2, 3])  # layers 2 and 1 have room for one each; two of the four ranks are left and the budget gives one
    assert list(allocator.ranks.values()) == [1, 4, 4] and allocator.complete


def test_dropping_the_reserve_changes_nothing():
    allocator, layers, step = growing(2, target_rank=2, winners=2)
    x = torch.randn(3, 6)
    step([1, 2])
    assert allocator.complete
    for each in layers:
        y = each.train()(x)
        each.extent[1] = each.extent[0] + 1
        assert torch.equal(each(x), y)


def test_a_winner_speaks_with_its_reserve_as_trained():
    """Advance learning: the component that wins is the one that has learned, not a new one."""
    _, layers, step = growing(2, target_rank=3, winners=1)
    trained = layers[1].lora_A[1].clone()
    step([1, 2])
    assert layers[1].extent.tolist() == [2, 3] and torch.equal(layers[1].lora_A[1], trained * (1 - 0.1 * 0.5))
    assert layers[1].components()[1].count_nonzero()


def test_what_waits_is_not_decayed():
    """lr 0.1 and decay 0.5 take 5 % of what learns at each step; a waiting component is as it was drawn."""
    _, layers, step = growing(2, target_rank=2, winners=1, interval=50, max_rank=4)
    before = [p.detach().clone() for p in (layers[0].lora_A, layers[0].lora_B)]
    for _ in range(3):
        step([1, 2])
    torch.testing.assert_close(layers[0].lora_A[:2], before[0][:2] * 0.95**3)
    assert torch.equal(layers[0].lora_A[2:], before[0][2:]) and torch.equal(layers[0].lora_B[:, 2:], before[1][:, 2:])


@pytest.mark.parametrize("warmup", [0, 1, 4, 40])
def test_a_new_component_trains_as_in_a_parameter_group_of_its_own(warmup):
    """Adam from scratch, warm-up and linear decay from the step at which it joined: torch's AdamW and transformers'
    schedule on the new row alone, against our share of the whole tensor's step; the old rows follow the main schedule.
    """
    steps, main = 12, [0.3, 0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    fields = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-30, "weight_decay": 0.0}
    torch.manual_seed(0)
    model = Linears(2).double()
    tune(model, IncreLoraConfig(targets=("layers.0", "layers.1"), target_rank=2, winners=1, warmup=2, interval=3))
    allocator, each = RankAllocator(model), model.layers[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **fields)
    allocator.attach(optimizer, steps=steps, warmup=warmup, share=lambda step: main[step - 1])
    alone: dict[str, tuple] = {}
    old = torch.nn.Parameter(each.lora_A[:2].detach().clone())
    plain = torch.optim.AdamW([old], **fields)
    for step in range(1, steps + 1):
        model.layers[0].importance, each.importance = torch.tensor(0.0), torch.tensor(1.0)
        gradients = {"A": torch.randn(8 - 2, 6).double(), "E": torch.randn(6).double()}
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        rank, learning = each.extent.tolist()
        each.lora_A.grad[:learning] = gradients["A"][:learning]
        each.lora_E.grad[:rank] = gradients["E"][:rank]
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.01 * main[step - 1]
        old.grad = gradients["A"][:2].clone()
        for parameter, adam, rate, row, key in alone.values():
            parameter.grad = gradients[key][row].clone()
            adam.param_groups[0]["lr"] = 0.01 * rate(step - 3)
            adam.step()
        optimizer.step()
        plain.step()
        if allocator.grew() and not alone:
            assert each.extent.tolist() == [2, 3] and step == 3
            for key, row, tensor in (("A", 2, each.lora_A), ("E", 1, each.lora_E)):
                parameter = nn.Parameter(tensor.detach()[row].clone())
                adam = torch.optim.AdamW([parameter], **fields)
                schedule = get_linear_schedule_with_warmup(adam, warmup, steps - step)
                alone[key] = (parameter, adam, schedule.lr_lambdas[0], row, key)
    torch.testing.assert_close(each.lora_A[:2], old, rtol=1e-12, atol=0)
    for parameter, _, _, row, key in alone.values():
        ours = (each.lora_A if key == "A" else each.lora_E)[row]
        torch.testing.assert_close(ours, parameter, rtol=1e-9, atol=1e-12)


def test_growth_is_decided_on_the_sum_over_processes():
    seen = []

    def reduce(tensor):
        seen.append(tensor.clone())
        return torch.tensor([5.0, 1.0], dtype=torch.float64)  # the other process saw much in layer 0

    allocator, _, step = growing(2, target_rank=2, attach={"reduce": reduce})
    step([0.0, 1.0])
    assert seen[0].tolist() == [0.0, 1.0] and list(allocator.ranks.values()) == [2, 1]


# ------------------------------------------------------------------------------------------------------------ training


class Rows:
    """Batches of tokens, each from a generator of its own."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        return {"tokens": torch.randint(41, (2, 9), generator=torch.Generator().manual_seed(self.index))}

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


CONFIG = IncreLoraConfig(target_rank=3, max_rank=6, winners=2, warmup=2, interval=2, dropout=0.2, reserve=2)


@pytest.fixture
def make_trainer(decoder, tmp_path):
    def make(folder, config=CONFIG, callbacks=(), **fields):
        torch.manual_seed(1)
        model = copy.deepcopy(decoder)
        tune(model, config)
        growth = RankGrowth(model)

        def loss_fn(model, batch):
            tokens = batch["tokens"]
            logits = model(tokens)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
            return Loss(loss, tokens.numel())  # the trainer adds the penalty

        fields = {"steps": 12, "lr": 0.02, "save_every": 0, "device": "cpu"} | fields
        trainer = Trainer(
            model,
            loss_fn,
            Rows(),
            TrainConfig(**fields),
            tmp_path / folder,
            [growth, *callbacks],
            {"peft": to_dict(config)},
        )
        return trainer, growth

    return make


def test_trains_to_the_budget_and_tells_the_ranks(make_trainer):
    trainer, growth = make_trainer("run")
    trainer.fit()
    told = [(r["step"], r["ranks"]) for r in trainer.metrics.read() if "ranks" in r]
    assert [step for step, _ in told] == [4, 6, 8]  # 6 layers: 12 ranks to give, 4 at a time
    assert all(r["penalty"] > 0 for r in trainer.metrics.read() if "loss" in r)
    assert told[-1][1] == growth.allocator.ranks and sum(growth.allocator.ranks.values()) == 18
    assert not trainer.optimizer._optimizer_step_pre_hooks and not trainer.optimizer._optimizer_step_post_hooks


def test_the_schedule_is_the_trainers(make_trainer, monkeypatch):
    """Warm-up as long as the run's, the trainer's learning rate as what a new component's is compared with."""
    trainer, growth = make_trainer("run", steps=10, warmup_ratio=0.3, schedule="linear")
    given = {}
    attach = growth.allocator.attach
    monkeypatch.setattr(
        growth.allocator, "attach", lambda *args, **options: (given.update(options), attach(*args, **options))
    )
    trainer.fit()
    assert (given["steps"], given["warmup"], given["reduce"]) == (10, 3, sum_over_processes)
    rates = [record["lr"] for record in trainer.metrics.read() if "lr" in record]
    assert [0.02 * given["share"](step) for step in range(1, 11)] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 11])
def test_a_resumed_run_ends_in_the_same_bits(make_trainer, stop):
    """Before the first growth, right after one, between two, at the budget, after it."""
    whole, whole_growth = make_trainer("whole")
    whole.fit()
    first, _ = make_trainer("cut", save_every=stop, keep_checkpoints=99)
    first.fit()
    resumed, growth = make_trainer("cut")
    assert resumed.resume(stop) == stop
    resumed.fit()
    assert resumed.metrics.path.read_bytes() == whole.metrics.path.read_bytes()
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert growth.state_dict() == whole_growth.state_dict()


def test_early_stopping_brings_back_the_ranks_of_the_best_weights(make_trainer):
    """Toy mistake: a rank that is no part of the weights; those of step 3 with step 8's scale are another model."""
    losses = iter([3.0, 2.0, 1.0, *[5.0] * 9])
    seen = {}

    def evaluate(model):
        seen[len(seen) + 1] = model(torch.arange(9)[None])
        return {"loss": next(losses)}

    trainer, growth = make_trainer("run", callbacks=[Evaluate(evaluate), EarlyStopping()], eval_every=1, patience=10)
    trainer.fit()
    assert trainer.weights_step == 3 and growth.allocator.complete
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(torch.arange(9)[None]), seen[3])


def test_with_gradient_checkpointing_all_is_the_same(make_trainer):
    for name, value in (("plain", False), ("recomputed", True)):
        make_trainer(name, gradient_checkpointing=value, accumulate=2, steps=9)[0].fit()
    plain, recomputed = (make_trainer(name)[0].metrics.path.read_text() for name in ("plain", "recomputed"))
    assert plain == recomputed


def test_too_few_steps_for_the_budget(make_trainer):
    said = (
        r"the ranks are to grow from 6 to 18 \(6 layers of target_rank=3 on average\), which takes until step 8, but "
    )
    with pytest.raises(ValueError, match=said + "there are only 8 steps: train longer, or give more winners"):
        make_trainer("run", steps=8)[0].fit()
    trainer, growth = make_trainer("enough", steps=9)
    trainer.fit()
    assert growth.allocator.complete


def test_a_run_that_ends_early_says_that_the_budget_was_not_reached(make_trainer):
    class Stop(EarlyStopping):
        def on_step(self, trainer, record):
            if record["step"] == 5:
                trainer.stop("enough")

    with pytest.warns(UserWarning, match="the ranks grew to 10 together, not to the budget of 18"):
        make_trainer("run", callbacks=[Stop()])[0].fit()


def test_compiled_training_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match=r"compile=true, but growing ranks look at gradients .* train with compile=fal"
    ):
        make_trainer("run", compile=True)[0].fit()


# ---------------------------------------------------------------------------------------------------- counts and files


def test_count_by_formula(decoder):
    config = IncreLoraConfig(max_rank=5, targets=("q_proj", "mlp.up_proj"))  # 16 -> 16 and 16 -> 20
    expected = 3 * 5 * ((16 + 16 + 1) + (16 + 20 + 1))
    assert num_parameters(config, decoder) == expected == tune(decoder, config).trainable


def test_a_layer_too_thin_for_max_rank_has_as_much_as_it_can(decoder):
    report = tune(decoder, IncreLoraConfig(max_rank=12, target_rank=8, targets=("v_proj",)))  # 16 -> 8
    assert report.trainable == 3 * 8 * (16 + 8 + 1)


def grown(model, config=None):
    """An IncreLoRA with layers of different ranks and random values, as after training."""
    config = config or IncreLoraConfig(target_rank=2, max_rank=5, alpha=6.0, targets=("q_proj", "v_proj"))
    tune(model, config)
    with torch.no_grad():
        for i, (_, wrapper) in enumerate(tunings_of(model)["default"].wrappers):
            wrapper.extent.copy_(torch.tensor([1 + i % 4, 1 + i % 4]))
            for parameter in (wrapper.lora_A, wrapper.lora_B, wrapper.lora_E):
                parameter.normal_(std=0.5)
    return model.eval()


def test_exported_it_is_a_plain_lora_of_ours(decoder, tokens):
    fresh = copy.deepcopy(decoder).eval()
    expected = grown(decoder)(tokens)
    config, tensors = export(decoder)
    assert type(config) is LoraConfig and dict(config.rank_pattern)["layers.1.self_attn.v_proj"] == 4
    report = tune(fresh, config)
    own = tunings_of(fresh)["default"].parameters()
    assert own.keys() == tensors.keys()
    ranks = {name: int(w.extent[0]) for name, w in tunings_of(decoder)["default"].wrappers}
    sizes = {"q_proj": 16 + 16, "v_proj": 16 + 8}
    assert report.trainable == sum(rank * sizes[name.rpartition(".")[2]] for name, rank in ranks.items())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    torch.testing.assert_close(fresh(tokens), expected, rtol=1e-5, atol=1e-5)  # float32; s is a factor elsewhere


def test_saved_it_loads_in_hugging_face_peft_and_in_ours_with_equal_outputs(llama, tokens, tmp_path):
    fresh = copy.deepcopy(llama)
    expected = grown(llama)(tokens).logits
    save_adapter(llama, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    ranks = {module.r["default"] for module in theirs.modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert ranks == {1, 2, 3, 4}
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    report = load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    values = load_file(tmp_path / "adapter_model.safetensors").values()
    assert report.method == "lora" and sum(value.numel() for value in values) == report.trainable


def test_a_head_trained_beside_it_is_exported_too(decoder):
    config = IncreLoraConfig(trainable=("lm_head",))
    tune(decoder, config)
    lora, tensors = export(decoder)
    assert lora.trainable == ("lm_head",) and torch.equal(tensors["lm_head.weight"], decoder.lm_head.weight)
    assert tensors["lm_head.weight"] is not decoder.lm_head.weight


def test_merges_and_unloads(decoder, tokens):
    before = decoder.eval()(tokens)
    other = copy.deepcopy(decoder)
    tuned = grown(decoder)(tokens)
    merge(decoder)
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)
    grown(other)
    unload(other)
    assert torch.equal(other(tokens), before)


def test_a_copy_and_a_state_dict_keep_the_ranks(decoder, tokens):
    again = copy.deepcopy(decoder)
    expected = grown(decoder)(tokens)
    assert torch.equal(copy.deepcopy(decoder)(tokens), expected)
    tune(again, tunings_of(decoder)["default"].config)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again.eval()(tokens), expected)


def test_autocast_gives_gradients_near_the_exact_ones(decoder, tokens, loss_fn):
    grown(decoder).train()
    gradients = []
    for enabled in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_fn(decoder, tokens).value
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters() if p.requires_grad]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_a_bfloat16_base_has_float32_components():
    ours = IncreLoRALinear(nn.Linear(6, 6).bfloat16(), 1, 2.0, max_rank=2)
    ours.watched = True
    y = ours(torch.randn(3, 6).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and ours.lora_A.dtype == torch.float32 and ours.lora_A.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- bad input


def test_config_says_all_that_is_wrong():
    with pytest.raises(ValueError) as error:
        IncreLoraConfig(rank=0, target_rank=1.5, winners=-1, beta1=1.0, alpha=0, targets="q_proj", dropout=1)
    for line in (
        "rank: a whole number, at least 1, not 0",
        "target_rank: a whole number, at least 1, not 1.5",
        "winners: a whole number, at least 1, not -1",
        r"beta1: a number in [0, 1), not 1.0",
        "alpha: a number above 0, not 0",
        "targets: a tuple of names",
        r"dropout: a number in [0, 1), not 1",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="rank <= target_rank <= max_rank is needed, not 4, 2, 8"):
        IncreLoraConfig(rank=4)
    with pytest.raises(ValueError, match='targets: name at least one, such as "q_proj"'):
        IncreLoraConfig(targets=())


def test_config_survives_json():
    assert from_dict(IncreLoraConfig, to_dict(CONFIG)) == CONFIG


def test_targets_that_do_not_fit(decoder):
    with pytest.raises(
        ValueError, match=r"IncreLoRA does not fit this Decoder, which is unchanged:\n.*'q_prj' matches"
    ):
        tune(decoder, IncreLoraConfig(targets=("q_prj",)))
    with pytest.raises(ValueError, match=r"rank 9 is outside 1..8, the ranks a 8 x 16 matrix can have"):
        tune(decoder, IncreLoraConfig(rank=9, target_rank=9, max_rank=9, targets=("v_proj",)))
    said = r"can have 24 ranks together and target_rank=9 means 27"
    with pytest.raises(ValueError, match=said):
        tune(decoder, IncreLoraConfig(target_rank=9, max_rank=9, targets=("v_proj",)))


def test_other_adapters_and_optimizers_do_not_grow(decoder):
    tune(decoder, LoraConfig())
    with pytest.raises(ValueError, match="ranks grow in an IncreLoRA; 'default' is lora"):
        RankAllocator(decoder)
    with pytest.raises(ValueError, match="'default' is no IncreLoRA but lora; save_adapter"):
        export(decoder)
    with pytest.raises(ValueError, match="ranks grow beside Adam or AdamW, not SGD"):
        growing(2, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
