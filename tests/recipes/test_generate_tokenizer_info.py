"""The small commands: what they print."""

import io
import json

import pytest
import torch

from minillm.generation import generate_text
from minillm.models import count_parameters, load_model
from minillm.recipes.locate import load
from minillm.tokenizers import SentencePieceTokenizer, load_tokenizer


def test_generating_is_seeded_and_reads_standard_input(base, cli, monkeypatch):
    words = ("max_new_tokens=12", "temperature=1.5")
    code, first, error = cli("generate", base, "the cat", *words)
    assert (code, error) == (0, "")
    assert cli("generate", base, "the cat", *words)[1] == first != cli("generate", base, "the cat", *words, "seed=1")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert cli("generate", base / "model", "-", *words, "--stream")[1] == first


def test_greedy_text_is_the_library_s_and_stops(base, cli):
    model, tokenizer, *_ = load(base)
    [text] = generate_text(model, tokenizer, ["the cat"], max_new_tokens=12)
    assert cli("generate", base, "the cat", "max_new_tokens=12", "temperature=0")[1] == text + "\n"
    assert cli("generate", base, "the cat", "max_new_tokens=12", "temperature=0", f"stop={text[0]}")[1] == "\n"
    assert text[0] not in ",= "


def test_the_default_length_is_what_fits(base, cli):
    """The model has 48 positions and the prompt 7 bytes."""
    words = ("temperature=0", "seed=3")
    code, text, error = cli("generate", base, "the cat", *words)
    assert (code, error) == (0, "") and text == cli("generate", base, "the cat", *words, "max_new_tokens=41")[1]
    code, _, error = cli("generate", base, "a" * 48, *words)
    assert code == 2 and "prompt of 48 tokens + max_new_tokens=1 make 49, more than the model's" in error


def test_prompts_that_look_like_options(base, cli):
    words = ("temperature=0", "max_new_tokens=5")
    expected = generate_text(*load(base)[:2], ["-x"], max_new_tokens=5)[0] + "\n"
    assert cli("generate", base, "--", "-x", *words) == (0, expected, "")


def test_stop_texts_with_spaces_that_count(base, cli):
    model, tokenizer, *_ = load(base)
    [text] = generate_text(model, tokenizer, ["the cat"], max_new_tokens=30)
    at = text.index(text[3])
    words = ("generate", base, "the cat", "max_new_tokens=30", "temperature=0")
    assert cli(*words, "stop=" + json.dumps([text[3], " nowhere"]))[1] == text[:at] + "\n"


def test_a_tokenizer_is_trained_used_and_shown(texts, sizes, cli, tmp_path):
    run, words = tmp_path / "tokenizer", (f"data.train={texts / 'text'}",)
    code, out, _ = cli("tokenizer", "train", *words, f"run={run}", "tokenizer.vocab_size=300", "tokenizer.kind=unigram")
    tokenizer = load_tokenizer(run / "tokenizer")
    assert code == 0 and isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.vocab_size == 300
    held_out = json.loads((run / "report.json").read_text())["held_out"]
    assert held_out["bytes_per_token"] == pytest.approx(held_out["bytes"] / held_out["tokens"])
    assert f"held_out: {held_out['bytes_per_token']:.2f} bytes per token" in out

    code, out, _ = cli("tokenizer", "show", run, "the cat é")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    shown = [int(row[1]) for row in rows if len(row) >= 4 and row[0].isdigit() and row[1].isdigit()]
    assert shown == tokenizer.encode("the cat é")
    assert f"{len(shown)} tokens for 9 characters, 10 bytes" in out

    base = tmp_path / "base"
    assert (
        cli(
            "pretrain", *words, *sizes, f"run={base}", f"tokenizer.folder={run}", "tokenizer.kind=bpe", "train.steps=1"
        )[0]
        == 0
    )
    assert load_model(base / "model").tokenizer_fingerprint == tokenizer.fingerprint
    code, out, _ = cli("info", run)
    assert code == 0 and "recipe" in out and tokenizer.fingerprint in out
    assert "holds a tokenizer and no model" in cli("generate", run, "a")[2]


def test_info_counts_what_is_there(base, cli):
    code, out, _ = cli("info", base)
    with torch.no_grad():
        counts = count_parameters(load_model(base / "model"))
    assert code == 0
    for part, count in counts.items():
        assert f"{part:<10} {count:,}" in " ".join(out.split()) or f"{part} {count:,}" in " ".join(out.split())
    assert f"weights {(base / 'model' / 'model.safetensors').stat().st_size:,} bytes" in " ".join(out.split())
    assert load_tokenizer(base / "model").fingerprint in out
    assert "hidden_size 16" in " ".join(out.split())


def test_info_of_this_machine_says_what_runs(cli):
    code, out, _ = cli("info")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.strip()}
    assert code == 0 and lines["torch"] == torch.__version__
    assert lines["attention"].startswith("torch native: not selected: the backend is 'torch'")
