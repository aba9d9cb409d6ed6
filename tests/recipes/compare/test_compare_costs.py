"""Memory, inference and forgetting, against what can be known of them."""

import dataclasses
import time
from types import MappingProxyType

import pytest
import torch
from torch import nn

from minillm.models import ModelConfig, build, save_model
from minillm.peft import LoraConfig, tune
from minillm.recipes.compare import ROWS, CompareConfig, costs
from minillm.recipes.compare.examples import make_problem
from minillm.recipes.compare.find import find_base
from minillm.recipes.compare.forgetting import HeldOut, sentinels
from minillm.tokenizers import ByteTokenizer
from minillm.training import causal_lm_loss


@pytest.fixture
def problem(bases, task):
    def make(kind="encoder", what="classification", **settings):
        config = CompareConfig(base="b", task="t", **{"batch_size": 4, "length": 48, **settings})
        return make_problem(find_base(str(bases[kind]))[0], task(what), config)

    return make


def test_the_ratio_of_two_times():
    """Three times the work takes about three times the CPU time."""

    def work(times):
        def function():
            end = time.process_time() + 0.002 * times
            while time.process_time() < end:
                pass

        return function

    one, three = costs.ratios(work(2), [work(2), work(6)], rounds=9)
    assert one == pytest.approx(1, rel=0.3) and three == pytest.approx(3, rel=0.3)


@pytest.mark.parametrize(("name", "merges"), [("lora", True), ("houlsby", False), ("prompt", False), ("full", True)])
def test_overhead_before_and_after_merging(name, merges, problem):
    found = costs.overhead(problem(), ROWS[name])
    assert found["unmerged"] > 0.3 and (found["merged"] is not None) == merges
    assert merges or "houlsby" not in name or "is not linear" in found["cannot_merge"]


@pytest.mark.slow
def test_memory_grows_with_what_trains(tmp_path, task):
    """Full tuning keeps a gradient and Adam's two moments of every value: 12 bytes each."""
    tokenizer = ByteTokenizer()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=256, num_layers=4, num_heads=4, max_positions=64)
    model = build(config)
    model.tokenizer_fingerprint = tokenizer.fingerprint
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    settings = CompareConfig(base="b", task="t", batch_size=4, length=16)
    frozen = dataclasses.replace(task(), splits=MappingProxyType(task().splits))  # as generated tasks are
    problem = make_problem(find_base(str(tmp_path))[0], frozen, settings)
    head, full = (costs.memory_added(problem, ROWS[name]) for name in ("head", "full"))
    values = sum(p.numel() for p in model.parameters())
    assert full - head > 0.6 * 12 * values and head < 12 * values / 2


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_forgetting_on_and_off(kind, problem, held_out):
    made = problem(kind)
    settings = CompareConfig(base="b", task="t", length=48, held_out=str(held_out), held_out_rows=4)
    text = HeldOut(made.base, held_out, settings)
    assert text.missing == "" and text.before > 1
    assert text.loss(made.new_model(3)) == text.before  # a new head changes nothing
    model = made.new_model(1)
    tune(model, LoraConfig(trainable=("classifier",)))
    assert text.loss(model) == text.before  # nor does a LoRA that has not trained
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    inside = text.loss(model)
    changes = text.changes(model)
    assert changes["on"] == inside - text.before != 0 and changes["off"] == 0.0
    body = getattr(model.body, "decoder", model.body)
    assert getattr(body, "lm_head", None) is None  # as it was


def test_the_held_out_loss_is_the_decoders(problem, held_out):
    """Computed by hand: the base's own loss on the text's first tokens."""
    made = problem("decoder")
    settings = CompareConfig(base="b", task="t", length=34, held_out=str(held_out), held_out_rows=3)
    ids = torch.tensor(made.tokenizer.encode(held_out.read_text())[: 3 * 32]).view(3, 32)
    with torch.no_grad():
        expected = causal_lm_loss(made.base.model, {"tokens": ids[:, :-1], "labels": ids[:, 1:]}).value.item()
    assert HeldOut(made.base, held_out, settings).before == pytest.approx(expected, rel=1e-6)


def test_why_forgetting_is_not_measured(problem, held_out, tmp_path, bases):
    made = problem("encoder")
    plain = CompareConfig(base="b", task="t", length=48)
    assert "give held_out=FILE" in HeldOut(made.base, tmp_path / "model", plain).missing
    given = CompareConfig(base="b", task="t", length=48, held_out=str(held_out))
    bare = made.base._replace(model=made.base.model.body)
    assert HeldOut(bare, held_out, given).missing == "the base has no LM head"
    assert HeldOut(bare, held_out, given).changes(nn.Linear(1, 1)) == {"on": None, "off": None}
    other = made.base._replace(tokenizer=ByteTokenizer())
    assert "no mask token" in HeldOut(other, held_out, given).missing
    assert sentinels(made.tokenizer) == tuple(made.tokenizer.special_ids[f"<extra_id_{i}>"] for i in range(32))
    other = find_base(str(bases["encoder_decoder"]))[0]._replace(tokenizer=ByteTokenizer())
    assert "no sentinels" in HeldOut(other, held_out, given).missing
    (tmp_path / "short.txt").write_text("short")
    short = CompareConfig(base="b", task="t", length=48, held_out=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="held_out: 6 tokens do not fill one row of length=48: give more text"):
        HeldOut(made.base, held_out, short)


def test_the_bases_own_held_out_text(problem, held_out, tmp_path):
    """A run keeps what it held out beside its model."""
    from minillm.data import Document, write_tokens

    made = problem("decoder")
    write_tokens([Document("a", held_out.read_text())], made.tokenizer, tmp_path / "data" / "held_out")
    settings = {"base": "b", "task": "t", "length": 48, "held_out_rows": 4}
    recorded = HeldOut(made.base, tmp_path / "model", CompareConfig(**settings))
    named = HeldOut(made.base, tmp_path / "model", CompareConfig(**settings, held_out=str(held_out)))
    assert recorded.before == named.before
