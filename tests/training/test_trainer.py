import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.models import build
from minillm.training import Loss, TrainConfig, causal_lm_loss, lr_at


def hand_written(model, batches, config: TrainConfig, accumulate: int) -> tuple[list[float], list[float]]:
    """The textbook loop: one sum over all labels of a step divided by their number, torch's clipping, plain AdamW."""
    decayed = [model.up_proj.weight, model.lm_head.weight]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, foreach=False)
    losses, norms = [], []
    for step in range(1, config.steps + 1):
        some = [next(batches) for _ in range(accumulate)]
        count = sum((batch["labels"] != -100).sum() for batch in some)
        total = 0.0
        for batch in some:
            logits = model(batch["tokens"]).flatten(0, 1)
            total += F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        optimizer.step()
        losses.append((total / count).item())
    return losses, norms


@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_textbook_loop(make_trainer, toy, toy_loader, accumulate):
    """Four clipped steps over unequal batches, in float64, where only the order of sums may differ."""
    torch.manual_seed(5)
    ours, theirs = toy().double(), toy().double()
    theirs.load_state_dict(ours.state_dict())
    trainer = make_trainer(model=ours, loader=toy_loader(), steps=4, accumulate=accumulate, clip=0.05, warmup_ratio=0.5)
    trainer.fit()
    losses, norms = hand_written(theirs.train(), toy_loader(), trainer.config, accumulate)
    records = trainer.metrics.read()
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-12)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-7)  # the share of a batch passes float32
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-7, atol=1e-9)
    assert min(norms) > 0.05  # clipped at every step


def test_equal_batches_need_no_second_pass(make_trainer, toy_loader, monkeypatch):
    """The correction factor is exactly 1 when all batches count alike, so the gradients are not touched again."""
    scaled = []
    monkeypatch.setattr(torch, "_foreach_mul_", lambda tensors, scale: scaled.append(scale))
    make_trainer("equal", loader=toy_loader(unequal=False), accumulate=3, clip=0.0).fit()
    make_trainer("single", loader=toy_loader(unequal=True), accumulate=1, clip=0.0).fit()
    assert scaled == []
    make_trainer("unequal", loader=toy_loader(unequal=True), accumulate=3, clip=0.0).fit()
    assert scaled and 1.0 not in scaled


def test_records(make_trainer, toy_loader):
    trainer = make_trainer(steps=3, log_every=2)
    last = trainer.fit()
    loader, tokens, seen = toy_loader(), 0, []
    for _ in range(3):
        tokens += int((next(loader)["labels"] != -100).sum())
        seen.append(tokens)
    records = trainer.metrics.read()
    assert [r["step"] for r in records] == [2, 3] and [r["tokens"] for r in records] == seen[1:]
    assert list(last) == ["step", "loss", "lr", "grad_norm", "tokens", "accuracy"] and records[-1] == last
    times = trainer.timing.read()
    assert [t["step"] for t in times] == [2, 3]
    assert times[0]["tokens_per_second"] == pytest.approx(seen[1] / times[0]["seconds"])
    assert times[0]["peak_memory_bytes"] > 10e6


def test_mode_is_put_back(make_trainer, toy):
    model = toy().eval()
    make_trainer(model=model, steps=1).fit()
    assert not model.training


def test_compiled_loss_is_the_same(make_trainer, monkeypatch):
    compiled, compile_module = [], nn.Module.compile

    def compile_eagerly(module):  # the whole graph, without the minutes that generating C++ for it takes
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    for name, value in (("plain", False), ("compiled", True)):
        make_trainer(name, compile=value, steps=3, accumulate=2).fit()
    plain, fast = (make_trainer(name).metrics.read() for name in ("plain", "compiled"))
    assert compiled == ["LossModule"]
    assert [r["loss"] for r in fast] == pytest.approx([r["loss"] for r in plain], rel=1e-5)


def test_gradient_checkpointing_changes_no_number(make_trainer, toy_loader, tiny_config):
    for name, value in (("plain", False), ("recomputed", True)):
        torch.manual_seed(0)
        model = build(dataclasses.replace(tiny_config, dropout=0.2))
        make_trainer(name, model=model, loss_fn=causal_lm_loss, gradient_checkpointing=value, steps=3).fit()
        assert model.gradient_checkpointing is value
    plain, recomputed = (make_trainer(name).metrics.path.read_text() for name in ("plain", "recomputed"))
    assert plain == recomputed


def test_bfloat16_is_autocast(make_trainer):
    trainer = make_trainer(precision="bfloat16", steps=3)
    dtypes = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.fit()
    exact = make_trainer("exact", steps=3)
    exact.fit()
    assert dtypes == [torch.bfloat16] * 3
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    losses = [[r["loss"] for r in t.metrics.read()] for t in (trainer, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bfloat16 keeps 8 bits: 0.4 % for each rounding
    assert losses[0] != losses[1]


def test_learns(make_trainer):
    first, last = (make_trainer(f"{n}", steps=n, lr=0.05).fit() for n in (1, 60))
    assert last["loss"] < 0.2 * first["loss"] and last["accuracy"] > 0.9


def test_loss_not_finite(make_trainer, toy_loss):
    def loss_fn(model, batch):
        loss = toy_loss(model, batch)
        calls.append(0)
        return loss._replace(value=loss.value * (math.nan if len(calls) == 4 else 1.0))

    calls = []
    trainer = make_trainer(loss_fn=loss_fn, save_every=3)
    with pytest.raises(ValueError) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith("step 4: the loss is not finite (loss nan, gradient norm nan, learning rate 0.00")
    assert "still those of step 3, saved in" in message and "step-000003; resuming repeats this step" in message
    assert "Likely causes: a learning rate too high" in message
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_gradient_not_finite_saves_the_state_before(make_trainer, toy_loss):
    """sqrt at 0 has a finite value and an infinite slope. The repaired run goes on as if nothing had happened."""

    def loss_fn(model, batch):
        loss = toy_loss(model, batch)
        calls.append(0)
        return loss._replace(value=loss.value + (0 * model.lm_head.bias).sqrt().sum()) if len(calls) == 5 else loss

    calls = []
    broken = make_trainer(loss_fn=loss_fn, dropout=0.5, save_every=3)
    with pytest.raises(ValueError, match=r"step 5: the gradient is not finite \(loss 2\.\d+, gradient norm nan"):
        broken.fit()
    repaired = make_trainer(dropout=0.5)
    assert repaired.resume() == 4
    repaired.fit()
    untouched = make_trainer("untouched", dropout=0.5)
    untouched.fit()
    assert repaired.metrics.path.read_bytes() == untouched.metrics.path.read_bytes()


def test_parameters_out_of_reach(make_trainer, toy):
    model = toy()
    model.unused, model.other = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 trainable parameters get no gradient from the loss: unused.weight, unus"):
        make_trainer(model=model).fit()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda loss: loss.value, r"a Tensor of shape \(\), and a Loss"),
        (lambda loss: None, "a NoneType, and"),
        (lambda loss: (loss.value, loss.weight), "a tuple, and"),
        (lambda loss: Loss(loss.value.expand(3), 3), r"a Loss of a Tensor of shape \(3,\), and a Loss of a scalar is"),
        (lambda loss: Loss(1.0, 3), "a Loss of a float, and"),
    ],
)
def test_loss_function_that_returns_something_else(make_trainer, toy_loss, wrong, said):
    with pytest.raises(ValueError, match=rf"the loss function returned {said}.*Write: return Loss\(value, weight\)"):
        make_trainer(loss_fn=lambda model, batch: wrong(toy_loss(model, batch))).fit()


def test_loss_without_a_graph(make_trainer, toy_loss):
    with pytest.raises(ValueError, match="the loss depends on no trainable parameter"):
        make_trainer(loss_fn=lambda m, b: Loss(toy_loss(m, b).value.detach(), 1)).fit()


def test_no_label_counts(make_trainer, toy_loss):
    def loss_fn(model, batch):
        return toy_loss(model, batch | {"labels": torch.full_like(batch["labels"], -100)})._replace(metrics={})

    with pytest.raises(ValueError, match="no label in the whole step counts"):
        make_trainer(loss_fn=loss_fn).fit()


def test_first_batch_without_labels(make_trainer, toy_loader, toy):
    """What all other batches are measured by counts nothing; the step is the mean over the rest all the same."""

    class FirstEmpty(toy_loader):
        def __next__(self):
            batch = super().__next__()
            return batch | {"labels": torch.full_like(batch["labels"], -100)} if self.index % 2 else batch

    torch.manual_seed(5)
    ours, theirs = toy().double(), toy().double()
    theirs.load_state_dict(ours.state_dict())
    trainer = make_trainer(model=ours, loader=FirstEmpty(), loss_fn=_plain_loss, steps=3, accumulate=2)
    trainer.fit()
    losses, norms = hand_written(theirs.train(), FirstEmpty(), trainer.config, 2)
    assert [r["loss"] for r in trainer.metrics.read()] == pytest.approx(losses, rel=1e-12)
    assert [r["grad_norm"] for r in trainer.metrics.read()] == pytest.approx(norms, rel=1e-7)


def _plain_loss(model, batch):
    labels = batch["labels"].flatten()
    count = (labels != -100).sum()
    return Loss(
        F.cross_entropy(model(batch["tokens"]).flatten(0, 1), labels, reduction="sum") / count.clamp(min=1), count
    )


def test_loader_that_ends(make_trainer, toy_loader):
    class Short(toy_loader):
        def __next__(self):
            if self.index == 5:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="the loader ended after 1 of a step's 2 batches: it must be endless"):
        make_trainer(loader=Short(), accumulate=2).fit()


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([{}], "of type list, has no __next__, no state_dict, no load_state_dict: a loader is an endless"),
        (iter([{}]), "of type list_iterator, has no state_dict, no load_state_dict: a loader is an endless"),
    ],
)
def test_loader_that_cannot_be_resumed(make_trainer, loader, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(loader=loader)


def test_model_without_gradient_checkpointing(make_trainer):
    with pytest.raises(ValueError, match="gradient_checkpointing=true, but Toy has no attribute of that name"):
        make_trainer(gradient_checkpointing=True)


def test_no_gpu(make_trainer):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU"):
        make_trainer(device="cuda")


def test_folder_that_holds_a_run(make_trainer):
    make_trainer(steps=1).fit()
    with pytest.raises(ValueError, match=r"already holds a run \(metrics.jsonl, checkpoints\): continue it"):
        make_trainer(steps=1).fit()
