"""The audit's table and each of its diagnoses, and that it leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.layers import Block
from minillm.peft import FullConfig, LoraConfig, Wrapper, audit, merge, replace_modules, tune

CONFIG = LoraConfig(rank=2, alpha=6.0, dropout=0.1)


def adamw(parameters, **options):
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], **{"lr": 1e-3, **options})


def names(audit):
    return [diagnosis.partition(":")[0] for diagnosis in audit.diagnoses]


def test_a_sound_set_up(decoder, tokens, loss_fn):
    tune(decoder, CONFIG)
    result = audit(decoder, tokens, loss_fn, adamw(decoder.parameters(), weight_decay=0.0))
    assert result.diagnoses == ()
    table = {}
    for name, group in result.groups():
        p = group[0]
        table[name] = (p.trainable, p.gradient, p.changed, p.in_optimizer, sum(p.bytes for p in group))
    assert table["layers.{0..2}.self_attn.q_proj.lora_A"] == (True, "B = 0", False, True, 3 * 2 * 16 * 4)
    assert table["layers.{0..2}.self_attn.v_proj.lora_B"] == (True, "yes", True, True, 3 * 8 * 2 * 4)
    assert table["layers.{0..2}.self_attn.q_proj.weight"] == (False, "-", False, False, 3 * 16 * 16 * 4)
    text = str(result)
    assert '"B = 0": what comes next starts as 0' in text and "336 of" in text
    (row,) = (line for line in text.splitlines() if "q_proj.lora_B" in line)
    assert " ".join(row.split()) == "layers.{0..2}.self_attn.q_proj.lora_B 96 float32 384 yes yes yes yes"


def test_it_leaves_no_trace(decoder, tokens, loss_fn):
    tune(decoder, CONFIG)
    optimizer = adamw(decoder.parameters())
    loss_fn(decoder, tokens).value.backward()
    optimizer.step()
    before = copy.deepcopy((decoder.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    first, second = (audit(decoder, tokens, loss_fn, optimizer) for _ in range(2))
    assert first == second  # dropout included
    torch.testing.assert_close(
        (decoder.state_dict(), optimizer.state_dict(), torch.get_rng_state()), before, rtol=0, atol=0
    )
    assert gradients.keys() == {name for name, p in decoder.named_parameters() if p.grad is not None}
    assert all(torch.equal(decoder.get_parameter(name).grad, grad) for name, grad in gradients.items())


def test_after_a_step_the_gradient_of_a_is_not_zero(decoder, tokens, loss_fn, perturb):
    tune(decoder, CONFIG)
    result = audit(perturb(decoder), tokens, loss_fn)
    assert {p.gradient for p in result.probes if p.trainable} == {"yes"} and result.diagnoses == ()
    assert '"B = 0"' not in str(result)
    assert {p.in_optimizer for p in result.probes} == {None}


def test_nothing_trains(decoder, tokens, loss_fn):
    result = audit(decoder.requires_grad_(False), tokens, loss_fn)
    assert names(result) == ["nothing trains", "adapter matched nothing"]
    assert "! nothing trains: every parameter is frozen; tune(model, config)" in str(result)


def test_everything_trains(decoder, tokens, loss_fn):
    assert names(audit(decoder, tokens, loss_fn)) == ["everything trains"]
    tune(decoder, FullConfig())
    assert names(audit(decoder, tokens, loss_fn)) == []


def test_adapter_not_in_the_optimizer(decoder, tokens, loss_fn):
    """The optimizer was built before the adapters: the classic."""
    optimizer = adamw(decoder.parameters())
    tune(decoder, CONFIG)
    result = audit(decoder, tokens, loss_fn, optimizer)
    assert names(result) == ["adapter not in the optimizer", "frozen but in the optimizer"]
    assert "layers.{0..2}.self_attn.q_proj.lora_A" in result.diagnoses[0]
    assert "embed_tokens.weight" in result.diagnoses[1]


def test_adapter_matched_nothing(decoder, tokens, loss_fn):
    tune(decoder, CONFIG)
    optimizer = adamw(decoder.parameters())
    merge(decoder, keep=True)
    assert names(audit(decoder, tokens, loss_fn, optimizer)) == ["nothing trains", "adapter matched nothing"]


def test_trainable_but_no_gradient(decoder, tokens, loss_fn):
    class WithSpare(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.spare = decoder, nn.Linear(2, 2)

        def forward(self, tokens):
            return self.decoder(tokens)

    model = WithSpare()
    tune(model, LoraConfig(rank=2, trainable=("spare",)))
    result = audit(model, tokens, loss_fn)
    (found,) = result.diagnoses
    assert found == "trainable but no gradient: the loss does not depend on them (spare.weight, spare.bias)"
    nn.init.zeros_(decoder.lm_head.weight)  # a path, but every gradient along it is zero
    assert "layers.{0..2}.self_attn.q_proj.lora_B" in audit(model, tokens, loss_fn).diagnoses[0]


class Recomputed(Wrapper):
    def __init__(self, base, reentrant):
        super().__init__()
        self.base, self.reentrant = base, reentrant

    def forward(self, x, **rest):
        return checkpoint(lambda x: self.base(x, **rest), x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reentrant", [True, False])
def test_no_gradient_through_checkpointing(decoder, tokens, loss_fn, reentrant):
    """Reentrant checkpointing looks only at a block's inputs: with a frozen embedding none needs a gradient."""
    replace_modules(decoder, lambda _, m: isinstance(m, Block), lambda _, block: Recomputed(block, reentrant))
    tune(decoder, CONFIG)
    result = audit(decoder, tokens, loss_fn)
    assert names(result) == (["no gradient through checkpointing", "trainable but no gradient"] if reentrant else [])


def test_learning_rate_zero_and_loss_not_finite(decoder, tokens, loss_fn):
    tune(decoder, CONFIG)
    assert names(audit(decoder, tokens, loss_fn, adamw(decoder.parameters(), lr=0.0))) == ["gradient but no change"]
    nn.init.constant_(decoder.norm.weight, float("nan"))
    assert names(audit(decoder, tokens, loss_fn))[0] == "the loss is not finite"


def test_frozen_but_changed(decoder, tokens, loss_fn):
    tune(decoder, CONFIG)

    def writes(model, tokens):
        with torch.no_grad():
            model.norm.weight.mul_(1.5)
        return loss_fn(model, tokens)

    assert audit(decoder, tokens, writes).diagnoses == (
        "frozen but changed: something writes to these weights (norm.weight)",
    )


def test_warnings_of_the_loss_are_passed_on(decoder, tokens, loss_fn):
    import warnings

    def warns(model, tokens):
        warnings.warn("mind the gap", stacklevel=1)
        return loss_fn(model, tokens)

    tune(decoder, CONFIG)
    with pytest.warns(UserWarning, match="mind the gap"):
        audit(decoder, tokens, warns)


@pytest.mark.parametrize("wrong", [lambda loss: loss.value, lambda loss: None, lambda loss: (loss.value, 3)])
def test_loss_function_that_returns_something_else(decoder, tokens, loss_fn, wrong):
    tune(decoder, CONFIG)
    with pytest.raises(ValueError, match=r"the loss function returned a \w+ without .* return Loss\(value, weight\)"):
        audit(decoder, tokens, lambda model, batch: wrong(loss_fn(model, batch)))
