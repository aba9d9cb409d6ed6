import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from minillm.evaluation import language_model_loss
from minillm.models import build


@pytest.fixture
def batches():
    made = [torch.randint(61, (rows, 7)) for rows in (3, 1)]
    for tokens in made:
        tokens[0, 5:] = -100
    return [{"tokens": tokens.clamp(min=0), "labels": tokens} for tokens in made]


def test_is_the_mean_over_all_tokens(tiny_decoder, batches):
    """Batches of 19 and 5 labels: the mean over 24 tokens, not the mean of two means."""
    found = language_model_loss(tiny_decoder, iter(batches), num_bytes=100)
    with torch.no_grad():
        logits = torch.cat([tiny_decoder(b["tokens"]).flatten(0, 1) for b in batches])
    nats = F.cross_entropy(logits, torch.cat([b["labels"].flatten() for b in batches]), reduction="sum").item()
    assert found == {
        "loss": pytest.approx(nats / 24, rel=1e-6),
        "perplexity": pytest.approx(math.exp(nats / 24), rel=1e-5),
        "tokens": 24,
        "bits_per_byte": pytest.approx(nats / math.log(2) / 100, rel=1e-6),
    }
    assert "bits_per_byte" not in language_model_loss(tiny_decoder, batches)


def test_equals_transformers(llama_twins):
    ours, theirs = llama_twins()
    tokens = torch.randint(61, (2, 9))
    loss = theirs(tokens, labels=tokens).loss.item()
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    assert language_model_loss(ours, [batch])["loss"] == pytest.approx(loss, rel=1e-6)


def test_uniform_predictions_cost_log_v(tiny_decoder, batches):
    """With all logits equal the loss is ln 61, the perplexity 61, and a byte of 24 in 24 costs log2 61 bits."""
    torch.nn.init.zeros_(tiny_decoder.lm_head.weight)
    found = language_model_loss(tiny_decoder, batches, num_bytes=24)
    assert found["loss"] == pytest.approx(math.log(61)) and found["perplexity"] == pytest.approx(61)
    assert found["bits_per_byte"] == pytest.approx(math.log2(61))


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_alone(tiny_config, batches, training):
    model = build(dataclasses.replace(tiny_config, dropout=0.5)).train(training)
    assert language_model_loss(model, batches) == language_model_loss(model, batches)  # no dropout
    assert model.training is training and all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        language_model_loss(model, (1 / 0 for _ in "x"))
    assert model.training is training


def test_nothing_to_evaluate(tiny_decoder, batches):
    batches[0]["labels"].fill_(-100)
    with pytest.raises(ValueError, match=r"nothing to evaluate: the 1 batches count no label \(all are -100\)"):
        language_model_loss(tiny_decoder, batches[:1])
    with pytest.raises(ValueError, match="nothing to evaluate: the 0 batches"):
        language_model_loss(tiny_decoder, [])
