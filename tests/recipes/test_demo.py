"""The demo at a tiny size, from text to report; what it says is what it measured."""

import json
import math
import re

import pytest
import torch

from minillm.cli import main
from minillm.data import TokenFile, sequential_batches
from minillm.evaluation import language_model_loss
from minillm.models import ModelConfig, load_model
from minillm.peft import LoraConfig, load_adapter, tune
from minillm.recipes.demo import DemoConfig, demo
from minillm.recipes.demo_report import rows
from minillm.training import TrainConfig

PLOTS = ("loss", "learning_rate", "trade_off", "attention", "next_token")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = DemoConfig(
        run=str(tmp_path_factory.mktemp("demo") / "run"),
        characters=120_000,
        length=32,
        batch_size=8,
        model=ModelConfig(vocab_size=500, hidden_size=32, num_layers=1, num_heads=2, max_positions=64),
        pretrain=TrainConfig(steps=12, lr=1e-2, save_every=0, eval_every=0),
        tune=TrainConfig(steps=6, lr=1e-2, save_every=0, eval_every=0),
        lora=LoraConfig(rank=4, alpha=8.0, targets=("all-linear",)),
        lora_lr=0.1,
        new_tokens=12,
    )
    said = []
    folder = demo(config, said.append)
    (folder / "said.txt").write_text("\n".join(said), encoding="utf-8")
    return folder


@pytest.fixture
def facts(run):
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_table_says_what_the_folders_hold(run, facts):
    held_out = TokenFile.open(run / "data" / "source-held-out")
    base = load_model(run / "base")
    values = language_model_loss(base, sequential_batches(held_out, 8, 32))
    assert facts["base"]["losses"]["source"] == pytest.approx(values["loss"], rel=1e-5)
    for row in facts["methods"]:
        model = load_model(run / "base")
        folder = run / row["method"].replace(" ", "-") / "adapter"
        report = load_adapter(model, folder)
        values = language_model_loss(model, sequential_batches(held_out, 8, 32))
        assert row["losses"]["source"] == pytest.approx(values["loss"], rel=1e-5)
        assert row["trainable"] == report.trainable
        assert row["artefact_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
        assert row["losses"]["source"] != facts["base"]["losses"]["source"]
        assert row["peak_memory"] > row["memory_before"] > 100e6
    # 1 layer, D=32, F=88: q, k, v, o of 32 x 32; gate, up, down between 32 and 88; each R (Din + Dout)
    assert facts["methods"][0]["trainable"] == 4 * (4 * (32 + 32) + 3 * (32 + 88))
    assert facts["methods"][2]["trainable"] == 500 * 32


@pytest.mark.slow
def test_reports_show_every_number_and_need_no_other_file(run, facts):
    markdown, html = ((run / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    said = (run / "said.txt").read_text(encoding="utf-8")
    for row in facts["methods"]:
        for loss in row["losses"].values():
            for text in (markdown, html, said):
                assert f"{loss:.3f}" in text and f"{math.exp(loss):.1f}" in text
        assert f"{row['trainable']:,}" in markdown and f"{100 * row['gap_closed']:.0f} %" in html
    for corpus in facts["corpora"].values():
        assert corpus["training"]["sha256"][:16] in markdown and f"{corpus['held_out']['bytes']:,}" in html
    assert f"{facts['merged_minus_unmerged']:.2e}" in markdown and facts["merged_minus_unmerged"] < 1e-4
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == len(PLOTS) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(alt for alt in re.findall(r'<img alt="([^"]*)"', html))
    for name in PLOTS:
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{name}.png)" in markdown


@pytest.mark.slow
def test_samples_come_from_all_samplers_before_and_after(facts):
    samples = facts["samples"]
    assert [sample["sampler"] for sample in samples] == ["greedy", "temperature 0.8", "top-k 20", "top-p 0.8"]
    assert all(isinstance(sample[which], str) for sample in samples for which in ("before", "after"))
    assert any(sample["before"] != sample["after"] for sample in samples)


@pytest.mark.slow
def test_the_adapter_starts_from_the_seed(run):
    """A of a LoRA is drawn from the config's seed, and six steps move it only a little."""
    before = load_model(run / "base")
    torch.manual_seed(0)
    tune(before, LoraConfig(rank=4, alpha=8.0, targets=("all-linear",)))
    after = load_model(run / "base")
    load_adapter(after, run / "LoRA" / "adapter")
    for name, parameter in before.named_parameters():
        if name.endswith("lora_A"):
            trained = after.get_parameter(name)
            assert torch.nn.functional.cosine_similarity(parameter.flatten(), trained.flatten(), dim=0) > 0.5


@pytest.mark.slow
def test_no_held_out_document_is_trained_on(run):
    for domain in ("documentation", "source"):
        training, held_out = (TokenFile.open(run / "data" / f"{domain}-{part}") for part in ("training", "held-out"))
        documents = [
            {file.tokens[begin:end].tobytes() for begin, end in zip(file.starts, file.ends, strict=True)}
            for file in (training, held_out)
        ]
        assert documents[0] and documents[1] and not documents[0] & documents[1]


@pytest.mark.slow
def test_its_folders_serve_the_other_commands(run, capsys):
    assert main(["generate", str(run / "LoRA"), "def read(", "max_new_tokens=3"]) == 0
    assert main(["info", str(run / "base")]) == 0
    assert main(["info", str(run)]) == 0
    assert main(["generate", str(run), "def"]) == 2
    assert "is a demo: its model is in" in capsys.readouterr().err
    assert main(["info", str(run / "base")]) == 0
    assert "vocab_size" in capsys.readouterr().out


@pytest.mark.slow
def test_a_used_folder_is_refused(run, capsys):
    assert main(["demo", f"run={run}"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_gap_closed_worked_by_hand():
    """Full tuning takes the loss from 5 to 3; one that ends at 3.5 has closed 1.5 of 2."""
    common = {"trainable": 1, "parameters": 4, "peak_memory": 9, "memory_before": 4}
    methods = [{"method": name, "losses": {"source": loss}, **common} for name, loss in (("LoRA", 3.5), ("full", 3.0))]
    found = rows({"source": 5.0}, methods)
    assert [row["gap_closed"] for row in found] == [0.75, 1.0]
    assert found[0]["share"] == 0.25 and found[0]["training_adds"] == 5


def test_methods_start_from_the_same_schedule():
    config = DemoConfig()
    assert config.methods()["full"][1] == config.tune
    assert config.methods()["LoRA"][1].lr == config.lora_lr and config.methods()["LoRA"][1].steps == config.tune.steps


def test_rows_longer_than_the_model_are_refused(capsys):
    assert main(["demo", "length=600"]) == 2
    assert "length=600 is more than model.max_positions=512" in capsys.readouterr().err
