"""A tiny text, and a base pretrained on it through the command line, once for all tests."""

import json
import random
from pathlib import Path

import pytest
import torch

from minillm.cli import main

WORDS = "the cat sat on a mat and saw one dog run over hills while rain fell softly upon old roofs".split()  # noqa: SIM905
SIZES = (
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.max_positions=48", "data.length=32",
    "data.batch_size=4", "data.eval_batches=2", "train.steps=6", "train.save_every=2", "train.eval_every=3",
    "train.device=cpu", "tokenizer.kind=bytes", "model.dropout=0.1",
)  # fmt: skip
TUNE = (
    "data.length=40",
    "data.batch_size=4",
    "train.steps=4",
    "train.eval_every=2",
    "train.device=cpu",
    "train.lr=0.01",
)


@pytest.fixture
def sizes() -> tuple[str, ...]:
    return SIZES


@pytest.fixture
def tune_sizes() -> tuple[str, ...]:
    return TUNE


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with text/ (12 files), notes.jsonl (prompts and completions) and broken ones."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    (folder / "text").mkdir()
    for i in range(12):
        lines = (" ".join(draw.choices(WORDS, k=9)) + "." for _ in range(12))
        (folder / "text" / f"{i:02}.txt").write_text("\n".join(lines))
    notes = ({"prompt": f"{i} times two is ", "completion": f"{2 * i}."} for i in range(40))
    (folder / "notes.jsonl").write_text("\n".join(map(json.dumps, notes)))
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "empty.txt").write_text("  \n")
    (folder / "short.txt").write_text("A line.\nAnother line.\nA third.\n")
    return folder


@pytest.fixture(scope="session")
def base(texts, tmp_path_factory) -> Path:
    """A finished pretraining run, never to be changed."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "base"
    assert main(["pretrain", f"data.train={texts / 'text'}", f"run={run}", *SIZES]) == 0
    return run


@pytest.fixture
def cli(capsys):
    """`cli(*words)` -> (exit code, what was printed, what stood on stderr)."""

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def held_out():
    """`held_out(run)` -> (held-out rows of a run of pretrain, its tokenizer, its model)."""
    import minillm
    from minillm.data import TokenFile
    from minillm.recipes.common import saved_config
    from minillm.recipes.pretrain import PretrainConfig, text_rows
    from minillm.tokenizers import load_tokenizer

    def open_run(run: Path):
        config, tokenizer = saved_config(PretrainConfig, run, "pretrain"), load_tokenizer(run / "model")
        files = [TokenFile.open(run / "data" / side) for side in ("train", "held_out")]
        return text_rows(config, tokenizer, files)[1], tokenizer, minillm.load(run / "model")

    return open_run
