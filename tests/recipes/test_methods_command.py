"""`minillm methods`: the table of all ways of tuning."""

import pytest

from minillm.models import ModelConfig, build
from minillm.peft import METHODS, num_parameters, tune
from minillm.recipes.methods import methods


def rows(table):
    lines = table.split("\n\n")[1].splitlines()
    return {line.split()[0]: line for line in lines[2:]}


def test_every_method_has_a_row_with_its_facts(cli):
    code, out, _ = cli("methods")
    assert code == 0 and out.startswith("gpt2: 124,439,808 values")
    found = rows(out)
    assert found.keys() == set(METHODS)
    for name, line in found.items():
        method = METHODS[name]
        assert method.title in line and (method.paper in line)
        assert ("  no  " in line) == bool(method.cannot_merge)
    assert out.count("R (Din + Dout) for each layer") == 2  # LoRA and QLoRA


def test_gpt2_by_the_papers_formulas():
    found = rows(methods("gpt2"))
    for name, count in {
        "lora": 12 * 2 * 8 * (768 + 768),
        "bitfit": 12 * 11 * 768 + 768,
        "prefix": 10 * 2 * 12 * 768,
        "prompt": 20 * 768,
        "full": 124_439_808,
    }.items():
        assert f" {count:,} " in found[name], found[name]


def test_counts_are_those_of_tuning(base, cli):
    """The formula on shapes alone is what a real model then has."""
    from minillm.recipes.locate import load_base

    out = cli("methods", base)[1]
    model = load_base(base / "model").model
    for name, line in rows(out).items():
        if name in ("lora", "prompt", "prefix", "ia3", "full"):
            assert f" {num_parameters(METHODS[name](), model):,} " in line


def test_what_does_not_fit_says_why(base, cli):
    out = cli("methods", base)[1]
    assert "bitfit" in out and "- bitfit: " in out  # the tiny base has no biases
    assert "- partial: lm_head.weight: its weight is tied" in out
    assert "- fusion: minillm tune fuses tuned bottlenecks: adapters=a:runs/one,b:runs/two" in out
    assert "- pruned_bitfit: minillm tune scores all biases first" in out


def test_unknown_model(cli):
    code, _, err = cli("methods", "no-such-model")
    assert code == 2 and "no-such-model does not exist" in err and "model card" in err


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_formulas_need_no_weights(kind):
    import torch

    config = ModelConfig(kind=kind, vocab_size=50, hidden_size=16, num_layers=2, num_heads=2)
    with torch.device("meta"):
        shape = build(config)
    real = build(config)
    for name in ("lora", "prompt", "prefix", "ia3", "bottleneck", "full"):
        config = METHODS[name]()
        counted = num_parameters(config, shape)
        assert counted == tune(build(real.config), config).trainable
