"""`minillm tune data.label=...` and `minillm classify`: naming the class of a text, by every method."""

import json
import random

import pytest
import torch

from minillm.files import read_json
from minillm.peft import METHODS
from minillm.recipes.locate import load

MORE = {  # what the tiny base needs beyond a method's defaults
    "bitfit": ("bitfit.create_missing=true",),
    "qalora": ("qalora.group=8", "qalora.rank=2"),
    "prompt": ("prompt.length=4",),
    "ptuning": ("ptuning.length=4",),
    "prefix": ("prefix.length=4",),
    "mola": ("mola.experts=2", "mola.shape=rectangle"),
    "increlora": ("increlora.interval=1", "increlora.warmup=1", "increlora.winners=4"),
    "pruned_bitfit": ("pruned_bitfit.create_missing=true", "pruned_bitfit.score_steps=3"),
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """60 texts whose class is a word in them."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("labelled")
    lines = []
    for i in range(60):
        label = draw.randrange(2)
        words = [*draw.choices(["the", "cat", "sat", "on", "mat"], k=4), ["rain", "roofs"][label]]
        draw.shuffle(words)
        lines.append(json.dumps({"text": f"{' '.join(words)} {i}", "label": label}))
    (folder / "task.jsonl").write_text("\n".join(lines))
    return folder / "task.jsonl"


def tune(cli, base, labelled, run, tune_sizes, *more):
    words = ("tune", f"base={base}", f"data.train={labelled}", "data.label=label", f"run={run}")
    return cli(*words, *tune_sizes, "data.held_out_share=0.3", *more)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fusion"])  # see test_stacked_runs.py
def test_every_method_in_one_command(method, base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    code, out, err = tune(cli, base, labelled, run, tune_sizes, f"method={method}", *MORE.get(method, ()))
    assert code == 0, err
    report = read_json(run / "report.json")
    measured = report["held_out"]["new text"]
    assert report["method"] == method and measured["after"]["count"] == measured["before"]["count"] > 8
    assert measured["after"]["loss"] != measured["before"]["loss"] and f"{measured['after']['accuracy']:.4f}" in out

    _, _, tuned, labels = load(run, writes=False)
    assert labels == ["0", "1"]
    if method == "increlora":  # saved as the LoRA that it has become: a rank of 2 on average, and the head
        assert (tuned.method, tuned.trainable) == ("lora", 4 * 2 * (16 + 16) + 2 * 16 + 2)
    else:
        assert (tuned.method, tuned.trainable) == (method, report["trainable"])
    code, table, err = cli("classify", run, "the cat sat on roofs")
    assert code == 0, err
    rows = dict(line.split() for line in table.splitlines()[2:])
    assert rows.keys() == {"0", "1"} and sum(map(float, rows.values())) == pytest.approx(1, abs=2e-4)


def test_the_head_trains_beside_the_method(base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    assert tune(cli, base, labelled, run, tune_sizes, "lora.rank=2")[0] == 0
    saved = read_json(run / "adapter" / "minillm.json")["config"]
    assert saved["trainable"] == ["classifier"]
    head = read_json(run / "adapter" / "head.json")
    assert head["labels"] == ["0", "1"] and head["head"]["pool"] == "last"
    model = load(run, writes=False).model
    assert model.classifier.weight.shape == (2, 16) and model.body.lm_head is None


def test_head_only(base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    assert tune(cli, base, labelled, run, tune_sizes, "method=partial")[0] == 0
    assert read_json(run / "report.json")["trainable"] == 2 * 16 + 2


def test_probabilities_are_the_models(base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    tune(cli, base, labelled, run, tune_sizes, "train.lr=0.1")
    model, tokenizer, *_ = load(run, writes=False)
    tokens = tokenizer.with_specials(tokenizer.encode("rain on a mat"))[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0].softmax(-1)
    table = cli("classify", run, "rain on a mat")[1]
    for line in table.splitlines()[2:]:
        name, probability = line.split()
        assert float(probability) == pytest.approx(expected[int(name)].item(), abs=1e-4)


def test_resuming_is_exact(base, labelled, tune_sizes, cli, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("train.save_every=2", "method=increlora", *MORE["increlora"], "train.steps=6")
    assert tune(cli, base, labelled, whole, tune_sizes, *more)[0] == 0
    assert tune(cli, base, labelled, parts, tune_sizes, *more)[0] == 0
    for name in ("000004", "000006"):
        assert any(name in str(path) for path in (parts / "checkpoints").iterdir())
    last = next(path for path in (parts / "checkpoints").iterdir() if "000006" in path.name)
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    (parts / "report.json").unlink()
    code, _, err = cli("tune", f"run={parts}", "--resume")
    assert code == 0, err
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_classifier_is_tuned_further(base, labelled, tune_sizes, cli, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert tune(cli, base, labelled, first, tune_sizes)[0] == 0
    code, out, err = tune(cli, first, labelled, second, tune_sizes, "method=bitfit", "bitfit.create_missing=true")
    assert code == 0 and "is merged into its base" in out, err
    assert cli("classify", second, "the cat")[0] == 0
    code, _, err = cli("tune", f"base={first}", f"data.train={labelled}", f"run={tmp_path / 'third'}", *tune_sizes)
    assert code == 2 and "with data.label minillm tune goes on from it" in err


def test_ranks_that_cannot_grow_in_time_are_said_before_the_run(base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    code, _, err = tune(cli, base, labelled, run, tune_sizes, "method=increlora")
    assert code == 2 and "but there are only 4 steps" in err and not (run / "config.json").exists()
    code, _, err = tune(cli, base, labelled, run, tune_sizes, "method=increlora", *MORE["increlora"])
    assert code == 0, err


def test_a_prompt_leaves_less_room(base, labelled, tune_sizes, cli, tmp_path):
    """The base has 48 positions, of which a prompt of 10 leaves 38: said before training, and minded afterwards."""
    run = tmp_path / "run"
    code, _, err = tune(cli, base, labelled, run, tune_sizes, "method=prompt", "prompt.length=10")
    assert code == 2 and "max_positions=48, of which prompt takes 10: set data.length=38 or lower" in err
    assert not run.exists()
    code, _, err = tune(cli, base, labelled, run, tune_sizes, "method=prompt", "prompt.length=10", "data.length=38")
    assert code == 0, err
    code, _, err = cli("classify", run, "the cat sat on a mat " * 20)
    assert code == 0, err


def test_wrong_labels(base, texts, labelled, tune_sizes, cli, tmp_path):
    def refused(pattern, file, *more):
        file.parent.mkdir(exist_ok=True)
        code, _, err = tune(cli, base, file, tmp_path / "run", tune_sizes, *more)
        assert code == 2 and pattern in err, err

    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a b", "label": 1}\n{"text": "a c", "label": 1}\n{"text": "a d", "label": 1}\n')
    refused("a classifier needs two classes at least", one)
    refused("needs either", texts / "notes.jsonl")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"text": "something else", "label": "third"}\n')
    code, _, err = cli(
        "tune", f"base={base}", f"data.train={labelled}", f"data.held_out={held_out}", "data.label=label", *tune_sizes,
        f"run={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 2 and "classes that no training text has: 'third'" in err


def test_a_classifier_writes_no_text_and_a_writer_names_no_class(base, labelled, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    tune(cli, base, labelled, run, tune_sizes)
    code, _, err = cli("generate", run, "the cat")
    assert code == 2 and "is a classifier (0, 1), which writes no text: minillm classify asks it" in err
    code, _, err = cli("classify", base, "the cat")
    assert code == 2 and "names no classes: it was not tuned with data.label" in err
