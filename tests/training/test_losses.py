import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.models import build
from minillm.training import causal_lm_loss


class Wrapped(nn.Module):
    """A head that is not a plain nn.Linear, as an adapter makes it; notes how many rows it sees at once."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.rows = base, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.base(x) * 0.5 + 0.1


@pytest.fixture
def batch():
    tokens = torch.randint(61, (5, 64))
    labels = tokens.roll(-1, 1)
    labels[torch.rand(labels.shape) < 0.3] = -100
    return {"tokens": tokens, "labels": labels}


@pytest.mark.parametrize("wrapped", [False, True])
def test_is_cross_entropy_of_all_logits(tiny_config, batch, wrapped):
    model = build(tiny_config).double()
    if wrapped:
        model.lm_head = Wrapped(nn.Linear(24, 61, dtype=torch.float64))
    found = causal_lm_loss(model, batch)
    gradients = torch.autograd.grad(found.value, list(model.parameters()))
    assert found.weight == (batch["labels"] != -100).sum()
    if wrapped:
        assert max(model.lm_head.rows) == 256 and sum(model.lm_head.rows) == 2 * 5 * 64  # forward and again backward
    expected = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-9, atol=1e-12
    )


def test_mask_and_positions_reach_the_model(tiny_decoder, batch):
    with torch.no_grad():
        for parameter in tiny_decoder.parameters():
            parameter.mul_(10)  # as it is initialised, attention hardly tells one position from another
    packed = batch | {"positions": torch.arange(64).flip(0), "mask": torch.rand(5, 64) < 0.9}
    logits = tiny_decoder(batch["tokens"], mask=packed["mask"], positions=packed["positions"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(causal_lm_loss(tiny_decoder, packed).value, expected)


def test_a_plain_head_is_never_called(tiny_decoder, batch):
    calls = []
    tiny_decoder.lm_head.register_forward_hook(lambda *args: calls.append(args))
    causal_lm_loss(tiny_decoder, batch).value.backward()
    assert calls == []


def test_no_label_counts(tiny_decoder, batch):
    loss = causal_lm_loss(tiny_decoder, batch | {"labels": torch.full((5, 64), -100)})
    assert (loss.value, loss.weight) == (0, 0)


def test_batch_without_labels(tiny_decoder, batch):
    with pytest.raises(ValueError, match=r"the batch has no labels; it has \['tokens'\]"):
        causal_lm_loss(tiny_decoder, {"tokens": batch["tokens"]})
