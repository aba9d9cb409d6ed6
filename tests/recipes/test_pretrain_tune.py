"""The recipes as their users meet them, through the command line, from text to a tuned model's text."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.data import TokenFile, sequential_batches
from minillm.evaluation import language_model_loss
from minillm.files import read_json
from minillm.models import count_parameters, load_model
from minillm.recipes import pretrain, tune
from minillm.recipes.common import began_and_ended, doubts
from minillm.recipes.locate import load
from minillm.tokenizers import load_tokenizer
from minillm.training import ProgressBar, Records


class Stop(ProgressBar):
    """Sends this process a signal when step 3 is done; training ends there."""

    def on_step(self, trainer, record):
        super().on_step(trainer, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def outcome(run: Path, weights: str) -> tuple[bytes, bytes, dict]:
    """What an interruption must not change: final weights, metrics, and the report but for the seconds."""
    report = read_json(run / "report.json")
    del report["seconds"]
    return (run / weights).read_bytes(), (run / "metrics.jsonl").read_bytes(), report


def test_pretraining_leaves_a_whole_run(base):
    model, tokenizer = load_model(base / "model"), load_tokenizer(base / "model")
    assert model.config.vocab_size == tokenizer.vocab_size == 259  # not ModelConfig's default
    assert model.config.num_kv_heads == 2  # follows from num_heads=2, though the default config has 6
    assert model.tokenizer_fingerprint == tokenizer.fingerprint == load_tokenizer(base / "tokenizer").fingerprint
    report, held_out = read_json(base / "report.json"), TokenFile.open(base / "data" / "held_out")
    measured = language_model_loss(model, sequential_batches(held_out, 4, 32), num_bytes=held_out.meta.counted_bytes)
    assert report["held_out"] == measured
    assert report["parameters"] == count_parameters(model)
    assert (report["steps"], report["tokens"]) == (6, Records(base / "metrics.jsonl").read()[-2]["tokens"])
    saved = read_json(base / "config.json")
    assert (saved["recipe"], saved["config"]["model"]["vocab_size"]) == ("pretrain", 259)
    assert (base / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [record["step"] for record in Records(base / "metrics.jsonl").read() if "eval" in record]
    assert steps == [3, 6]


@pytest.mark.parametrize(
    "losses, said",
    [
        ((5.0, 3.0, 3.1), []),
        ((5.0, 5.1, 3.1), ["ended higher than it began (5.0000, then 5.1000)"]),
        ((5.6, 5.5, 5.5), ["is no better than guessing every token alike (ln 259 = 5.5568)"]),
        ((5.6, 9.0, 9.0), ["ended higher", "guessing"]),
        ((5.6, float("nan"), float("nan")), ["ended higher", "guessing"]),
    ],
)
def test_a_run_that_learned_nothing_is_warned_about(losses, said, capsys):
    found = doubts(*losses, vocab_size=259)
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))
    assert capsys.readouterr().out == "".join(f"warning: {line}\n" for line in found)


def test_the_report_holds_the_warnings(base, texts, tune_sizes, cli, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {20 - i}}}\n' for i in range(20)))
    assert began_and_ended(tmp_path) == (19.5, 1.5)
    assert len(read_json(base / "report.json")["warnings"]) == 1  # six steps are too few to learn from
    words = ("tune", f"base={base}", f"data.train={texts / 'notes.jsonl'}", *tune_sizes, "method=full")
    code, out, _ = cli(*words, f"run={tmp_path / 'run'}", "train.lr=30", "train.clip=0")
    warnings = read_json(tmp_path / "run" / "report.json")["warnings"]
    assert code == 0 and len(warnings) == 2 and "warning: the loss ended higher than it began" in out


def test_held_out_documents_are_no_training_documents(base, texts):
    training, held_out = (TokenFile.open(base / "data" / side) for side in ("train", "held_out"))
    assert training.meta.num_documents + held_out.meta.num_documents == 12
    tokenizer = load_tokenizer(base / "tokenizer")
    found = [
        tokenizer.decode(f.tokens[s : e - 1])
        for f in (training, held_out)
        for s, e in zip(f.starts, f.ends, strict=True)
    ]
    assert sorted(found) == sorted(file.read_text() for file in (texts / "text").iterdir())


@pytest.mark.parametrize("method", [("lora", "lora.rank=2"), ("full",), ("partial", "partial.untie=true")])
def test_tuning_examples_and_generating(method, base, texts, tune_sizes, cli, tmp_path):
    run = tmp_path / "run"
    settings = (f"method={method[0]}", *method[1:], *tune_sizes, "data.held_out_share=0.125")
    code, out, _ = cli("tune", f"base={base}", f"data.train={texts / 'notes.jsonl'}", f"run={run}", *settings)
    assert code == 0 and "padded rows, one document each (there are prompts)" in out
    report = read_json(run / "report.json")
    model, tokenizer, tuned, _ = load(run)
    assert (report["method"], report["trainable"]) == (method[0], tuned.trainable)
    assert model.config.tie_embeddings == (method[0] != "partial")

    measured = report["held_out"]["new text"]
    file = TokenFile.open(run / "data" / "held_out")
    assert file.meta.num_documents == 5  # one more than a batch
    before, after = (by_hand(m, file) for m in (load_model(base / "model"), model))
    assert measured["before"]["loss"] == pytest.approx(before, rel=1e-5)
    assert measured["after"]["loss"] == pytest.approx(after, rel=1e-5)
    assert after < before
    forgotten = report["held_out"]["the base's text"]
    assert forgotten["before"]["loss"] == pytest.approx(read_json(base / "report.json")["held_out"]["loss"], rel=0.05)
    assert f"{after:.4f}" in out

    code, text, _ = cli("generate", run, "2 times two is ", "temperature=0", "max_new_tokens=5")
    streamed = cli("generate", run, "2 times two is ", "temperature=0", "max_new_tokens=5", "--stream")
    merged = cli("generate", run, "2 times two is ", "temperature=0", "max_new_tokens=5", "merge=true")
    assert code == 0 and streamed[1] == merged[1] == text
    ids = torch.tensor([tokenizer.encode("2 times two is ")])
    first = tokenizer.decode(model(ids)[:, -1].argmax(-1).tolist())
    assert text.startswith(first)


def by_hand(model, file: TokenFile) -> float:
    """Mean loss of the completions and their end-of-text token, one document at a time, with torch's own loss."""
    losses = []
    for start, counted, end in zip(file.starts, file.counted, file.ends, strict=True):
        ids = torch.from_numpy(file.tokens[start:end].astype("int64"))
        logits = model(ids[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[counted - start - 1 :])
    return torch.cat(losses).mean().item()


def test_pretraining_on_examples_pads_them(texts, sizes, cli, tmp_path):
    """Labels are the completions only, and the measured loss is theirs, one document at a time."""
    words = ("pretrain", f"data.train={texts / 'notes.jsonl'}", *sizes, "data.held_out_share=0.125", "data.length=40")
    code, out, _ = cli(*words, f"run={tmp_path}")
    assert code == 0 and "padded rows, one document each (there are prompts): 35 documents" in out
    assert "training sees 24 rows, 0.7 times the text" in out
    file, training = (TokenFile.open(tmp_path / "data" / side) for side in ("held_out", "train"))
    measured = read_json(tmp_path / "report.json")["held_out"]["loss"]
    assert measured == pytest.approx(by_hand(load_model(tmp_path / "model"), file), rel=1e-5)
    counted = (training.ends - training.counted).tolist()  # completion and end of text, of 24 different documents
    records = [record["tokens"] for record in Records(tmp_path / "metrics.jsonl").read() if "tokens" in record]
    assert sum(sorted(counted)[:24]) <= records[-1] <= sum(sorted(counted)[-24:]) < len(training) // 2


def test_tuning_on_plain_text_packs_it(base, texts, tune_sizes, cli, tmp_path):
    words = ("tune", f"base={base / 'model'}", f"data.train={texts / 'text'}", *tune_sizes)
    code, out, _ = cli(*words, f"run={tmp_path / 'packed'}")
    assert code == 0 and "packed rows, documents end to end (there are no prompts)" in out
    with pytest.warns(UserWarning, match="documents are longer than length 40"):
        code, out, _ = cli(*words, f"run={tmp_path / 'padded'}", "data.rows=padded")
    assert code == 0 and "padded rows, one document each (data.rows=padded)" in out
    assert "bits_per_byte" not in read_json(tmp_path / "padded" / "report.json")["held_out"]["new text"]["after"]


def test_an_adapter_follows_its_base_and_refuses_another(base, texts, sizes, tune_sizes, cli, tmp_path):
    (tmp_path / "here").mkdir()
    mine, run = tmp_path / "here" / "mine", tmp_path / "here" / "tuned"
    shutil.copytree(base, mine)
    assert cli("tune", f"base={mine}", f"data.train={texts / 'notes.jsonl'}", f"run={run}", *tune_sizes)[0] == 0
    expected = cli("generate", run, "the cat", "max_new_tokens=5")[1]
    (tmp_path / "here").rename(tmp_path / "there")  # both together: nothing to say
    mine, run = tmp_path / "there" / "mine", tmp_path / "there" / "tuned"
    assert cli("generate", run, "the cat", "max_new_tokens=5") == (0, expected, "")
    moved = mine.rename(tmp_path / "moved")
    code, _, error = cli("generate", run, "the cat")
    assert code == 2 and "the base of the adapter in" in error and "If it was moved, say where it is now" in error
    assert "no: give base=FOLDER" in cli("info", run)[1]
    assert cli("generate", run, "the cat", "max_new_tokens=5", f"base={moved}") == (0, expected, "")
    other = tmp_path / "other"
    assert cli("pretrain", f"data.train={texts / 'text'}", f"run={other}", "seed=5", *sizes)[0] == 0
    code, _, error = cli("generate", run, "the cat", f"base={other}")
    assert code == 2 and "it was trained on a base with other weights" in error


@pytest.mark.parametrize("first", [("lora",), ("partial", "partial.untie=true")])
def test_a_tuned_run_is_tuned_again(first, base, texts, tune_sizes, cli, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("tune", f"data.train={texts / 'notes.jsonl'}", *tune_sizes)
    assert cli(*words, f"base={base}", f"run={one}", f"method={first[0]}", *first[1:])[0] == 0
    code, out, _ = cli(*words, f"base={one}", f"run={two}", "seed=1")
    assert code == 0 and f"{one / 'adapter'} ({first[0]}) is merged into its base" in out
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        tuned, merged = load(one).model(tokens), load(two / "base").model(tokens)
    torch.testing.assert_close(merged, tuned)  # the sum is rounded once more: float32's default tolerance
    held_out = read_json(two / "report.json")["held_out"]
    assert held_out["new text"]["before"]["loss"] == pytest.approx(
        read_json(one / "report.json")["held_out"]["new text"]["after"]["loss"], rel=1e-5
    )
    forgotten = held_out["the base's text"]["before"]  # one/ held the same text out; here it is packed
    assert forgotten["loss"] == pytest.approx(held_out["new text"]["before"]["loss"], rel=0.01)
    shutil.rmtree(one)
    assert cli("generate", two, "2 times two is ", "max_new_tokens=3")[0] == 0  # needs nothing else
    assert read_json(two / "config.json")["config"]["base"] == str(one / "adapter")


@pytest.mark.parametrize("recipe", ["pretrain", "tune"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    recipe, base, texts, sizes, tune_sizes, cli, tmp_path, monkeypatch
):
    words, weights, module = {
        "pretrain": ((f"data.train={texts / 'text'}", *sizes), "model/model.safetensors", pretrain),
        "tune": (
            (f"base={base}", f"data.train={texts / 'notes.jsonl'}", *tune_sizes, "train.steps=6", "lora.dropout=0.2"),
            "adapter/adapter_model.safetensors",
            tune,
        ),
    }[recipe]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli(recipe, *words, f"run={whole}")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "ProgressBar", Stop)
        code, out, error = cli(recipe, *words, f"run={run}")
    assert code == 130 and "SIGINT: stopped after step 3" in error
    assert f"Go on with: minillm {recipe} run={run} --resume" in out
    code, _, error = cli("generate", run, "the cat")
    assert code == 2 and f"has not finished: minillm {recipe} run={run} --resume" in error
    assert f"no: minillm {recipe} run={run} --resume goes on" in cli("info", run)[1]

    code, out, _ = cli(recipe, f"run={run}", "--resume")
    assert code == 0 and "goes on after step 3" in out
    assert outcome(run, weights) == outcome(whole, weights)
    shutil.rmtree((run / weights).parent)  # as if it had been killed between training and saving
    (run / "report.json").unlink()
    assert cli(recipe, "--resume", f"run={run}")[0] == 0
    assert outcome(run, weights) == outcome(whole, weights)


def test_resuming_changes_only_what_may_change(texts, sizes, cli, tmp_path):
    run = tmp_path / "run"
    assert cli("pretrain", f"data.train={texts / 'text'}", f"run={run}", *sizes, "train.schedule=constant")[0] == 0
    code, _, error = cli("pretrain", f"run={run}", "--resume", "train.lr=0.5", "data.seed=3", "train.steps=8")
    assert code == 2 and "train.lr: 0.5 now, 0.001 then" in error and "data.seed: 3 now, 0 then" in error
    assert "train.steps: " not in error
    assert cli("pretrain", f"run={run}", "--resume", "train.steps=8", "train.lr=0.001")[0] == 0
    assert read_json(run / "report.json")["steps"] == read_json(run / "config.json")["config"]["train"]["steps"] == 8
    assert cli("pretrain", f"run={run}", "--resume")[0] == 0


def test_resuming_checks_what_it_reads(base, cli, tmp_path):
    run = shutil.copytree(base, tmp_path / "run")
    tokens = run / "data" / "held_out" / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[0] ^= 1
    tokens.write_bytes(content)
    code, _, error = cli("pretrain", f"run={run}", "--resume")
    assert code == 2 and "tokens.bin has the right size but other content than was written. Put it back" in error
    content[0] ^= 1
    tokens.write_bytes(content)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    code, _, error = cli("pretrain", f"run={run}", "--resume")
    assert code == 2 and "is finished, but its checkpoints/ are gone" in error


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["data", "finish"])
def test_an_error_in_the_main_process_ends_all(broken, base, texts, sizes, tmp_path):
    run = tmp_path / "run"
    words = ["pretrain", f"data.train={texts / 'nowhere'}", *sizes, f"run={run}"]
    expected = "nowhere does not exist"
    if broken == "finish":
        shutil.copytree(base, run)
        shutil.rmtree(run / "checkpoints")
        (run / "metrics.jsonl").unlink()  # as if it had been killed before its first checkpoint
        (run / "report.json").unlink()
        (run / "model" / "mine.txt").write_text("a file that would be lost")
        words, expected = ["pretrain", f"run={run}", "--resume"], "mine.txt"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "minillm")
    done = subprocess.run(
        [*torchrun, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("minillm (process")]
    # on a busy machine torchrun may end the second process before it has spoken
    assert said and all(expected in line for line in said)
    assert "Connection closed by peer" not in done.stderr and "minillm/training" not in done.stderr  # a traceback


@pytest.mark.slow
def test_two_processes_pretrain_as_one(texts, sizes, cli, tmp_path):
    """The same sums in another order, in float32: 1e-5 relative after four steps."""
    words = ("pretrain", f"data.train={texts / 'text'}", *sizes, "model.dropout=0", "train.steps=4")
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert cli(*words, f"run={alone}")[0] == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "minillm")
    done = subprocess.run(
        [*torchrun, *words, f"run={pair}"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1
    ours, theirs = ([r.get("eval", r) for r in Records(run / "metrics.jsonl").read()] for run in (pair, alone))
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-5)
