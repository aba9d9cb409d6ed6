"""What the trainer knows of tuning methods: their penalty joins the loss, and their callback must be there."""

import pytest
import torch

from minillm.models import ModelConfig, build
from minillm.peft import IncreLoraConfig, LoraConfig, MolaConfig, auxiliary_loss, tune
from minillm.training import RankGrowth, TrainConfig, Trainer, causal_lm_loss
from minillm.training.gradients import Gradients

SIZES = dict(vocab_size=31, hidden_size=16, num_layers=4, num_heads=2, max_positions=32)
MOLA = MolaConfig(rank=2, experts=4, shape="rectangle", top_k=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(ModelConfig(**SIZES))


def batches():
    tokens = torch.randint(0, 31, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(10) < torch.tensor([[10], [7], [4]])
    return {"tokens": tokens, "labels": tokens.roll(-1, 1).masked_fill(~mask, -100), "mask": mask}


def gradients(model, loss_fn):
    model.zero_grad()
    Gradients(model, loss_fn, torch.device("cpu"), TrainConfig(accumulate=1)).compute([batches()], False)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_penalty_joins_the_loss_whatever_the_loss_function(model):
    """Else a mixture of experts trained with any loss function would silently lose its balance."""
    tune(model, MOLA)
    model.train()
    found = gradients(model, causal_lm_loss)
    model.zero_grad()
    batch = batches()
    loss = causal_lm_loss(model, batch).value
    penalty = auxiliary_loss(model, batch["mask"])
    assert penalty > 0
    (loss + penalty).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)
    model.zero_grad()
    causal_lm_loss(model, batch).value.backward()
    without = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    routers = [name for name in found if name.endswith("router")]
    assert routers and any(not torch.equal(found[name], without[name]) for name in routers)


def test_the_log_has_the_penalty(model):
    tune(model, MOLA)
    model.train()
    found = Gradients(model, causal_lm_loss, torch.device("cpu"), TrainConfig(accumulate=1)).compute([batches()], False)
    assert found.metrics["penalty"] > 0 and found.loss > found.metrics["penalty"]


def test_without_a_penalty_nothing_is_added(model):
    tune(model, LoraConfig(rank=2))
    found = Gradients(model, causal_lm_loss, torch.device("cpu"), TrainConfig(accumulate=1)).compute([batches()], False)
    assert "penalty" not in found.metrics
    assert found.loss == pytest.approx(causal_lm_loss(model, batches()).value.item())


class Endless:
    def __iter__(self):
        return self

    def __next__(self):
        return batches()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_growing_ranks_need_their_callback(model, tmp_path):
    """Without it they would stay as small as they began, and nobody would know."""
    tune(model, IncreLoraConfig(rank=1, target_rank=2, interval=1, warmup=1, winners=8))
    arguments = (model, causal_lm_loss, Endless(), TrainConfig(steps=4, device="cpu"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"trained by increlora.*callbacks=\[RankGrowth\(model, 'default'\)"):
        Trainer(*arguments)
    Trainer(*arguments, callbacks=[RankGrowth(model)])


def test_ranks_that_do_not_grow_need_none(model, tmp_path):
    tune(model, IncreLoraConfig(rank=2, target_rank=2))
    Trainer(model, causal_lm_loss, Endless(), TrainConfig(steps=4, device="cpu"), tmp_path / "run")
