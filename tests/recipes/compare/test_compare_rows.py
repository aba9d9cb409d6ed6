"""The table of methods, and how a user adds to it."""

import pytest
from tiny_tasks import COLOURS

from minillm.data.tasks import Text
from minillm.files import read_json
from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, RankAllocator, num_parameters, tune
from minillm.recipes.compare import ROWS, Row, compare, register_row
from minillm.recipes.compare.rows import FAMILIES, choose_rows, growing

ISSUE = (
    "head", "full", "last-2", "bitfit", "bitfit-half", "houlsby", "pfeiffer", "ia3", "lora", "rslora", "increlora",
    "mola", "qlora", "qalora", "prompt", "ptuning", "prefix",
)  # fmt: skip
BASE = {"vocab_size": 64, "hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_positions": 64}
BERT = {"norm": "layer", "mlp": "plain", "activation": "gelu", "attention_bias": True, "mlp_bias": True}


def test_all_methods_are_there():
    assert tuple(ROWS) == ISSUE and {row.family for row in ROWS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ISSUE)
def test_every_row_fits_a_base_with_biases(name):
    """By formula, on a decoder with all that any method asks for."""
    model = build(ModelConfig(**BASE, **BERT, intermediate_size=256))
    total = sum(p.numel() for p in model.parameters())
    count = num_parameters(ROWS[name].config(model, 100), model)
    assert count == total if name == "full" else 0 < count < total


@pytest.mark.parametrize("steps", [4, 12, 50, 100, 300, 3000])
def test_the_ranks_have_grown_in_time(steps):
    model = build(ModelConfig(**BASE))
    config = growing(model, steps)
    tune(model, config)
    allocator = RankAllocator(model)
    allocator.check_steps(steps)  # raises if the budget could not be reached
    assert allocator._last_growth() <= max(0.75 * steps, 3)


def test_names_are_found_in_the_tables_order():
    assert [row.name for row in choose_rows(("lora", "head"))] == ["head", "lora"]
    assert len(choose_rows(("lora", "all"))) == len(ROWS)
    with pytest.raises(ValueError, match=r"methods: there is no 'lroa'; did you mean .*lora.*\n  there is no 'fll'"):
        choose_rows(("lroa", "head", "fll"))
    with pytest.raises(ValueError, match="methods: which"):
        choose_rows(())


def test_a_row_of_a_users_own(config, task, no_costs, monkeypatch):
    monkeypatch.setattr("minillm.recipes.compare.rows.ROWS", rows := dict(ROWS))
    mine = Row("lora-1", "LoRA, rank 1", "mine", LoraConfig(rank=1), (3e-3, 1e-2, 1e-3))
    assert register_row(mine) is mine and register_row(mine) is mine and rows["lora-1"] == mine
    folder = compare(config(methods=("full", "lora-1"), seeds=1), task())
    assert (
        "LoRA, rank 1" in (folder / "table.md").read_text() and "LoRA, rank 1" in (folder / "report.html").read_text()
    )
    last = read_json(folder / "results.json")["rows"][-1]
    assert last["trainable"] == 4 * (16 + 16) + (16 * 16 + 16) + (2 * 16 + 2)  # two targets in two layers, and the head
    with pytest.raises(ValueError, match="there is a row 'lora' already: LoRA; choose another name"):
        register_row(Row("lora", "mine", "mine", LoraConfig(), (3e-3, 1e-2, 1e-3)))


@pytest.mark.parametrize(
    ("name", "rates", "flaw"),
    [
        ("a/b", (1e-3, 1e-2, 1e-1), "name 'a/b': letters, digits, - and _"),
        ("a", (1e-3, 1e-2), "3 different numbers above 0"),
        ("a", (1e-3, 1e-3, 1e-2), "3 different numbers above 0"),
        ("a", (1e-3, 0.0, 1e-2), "3 different numbers above 0"),
    ],
)
def test_a_row_that_cannot_be_compared(name, rates, flaw):
    with pytest.raises(ValueError, match=flaw):
        Row(name, "mine", "mine", LoraConfig(), rates)


def test_a_method_and_a_metric_of_a_users_own_in_one_file(config, task, no_costs, monkeypatch):
    from minillm.evaluation import metrics

    def share_of_red(predictions, references):
        return sum(p == COLOURS.index("red") for p in predictions) / len(references)

    monkeypatch.setattr(metrics, "_METRICS", known := dict(metrics._METRICS))
    monkeypatch.setattr("minillm.recipes.compare.judge.METRICS", known)
    metrics.metric(share_of_red)
    folder = compare(config(metric="share_of_red", seeds=1), task())
    found = read_json(folder / "rows/lora/seed-1/result.json")
    said = read_json(folder / "rows/lora/seed-1/predictions.json")["predictions"]
    assert found["metrics"]["share_of_red"] == found["score"] == said.count(0) / 16
    assert "accuracy" in found["metrics"] and isinstance(task()["test"][0], Text)
