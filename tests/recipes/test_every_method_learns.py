"""Every method, in one command, learns a task better than a head on the frozen base does.

The base has read lines in which one word decides how the line ends: eight words, one of them of a group that names the
mood, then "mood" and the mood's word. The task is to tell from the eight words alone whether the mood is a light one.
The base knows the answer, but at the last word it does not think of it yet: a head alone finds little there.
"""

import json
import random
import string

import pytest
import torch

from minillm.cli import main
from minillm.files import read_json
from minillm.peft import METHODS

MOODS = ("merry", "gloomy", "quiet", "furious")
LIGHT = {"merry", "quiet"}
NAMES = string.ascii_letters[:40]  # words of one letter: a small tokenizer makes each of them one token
GROUPS, FILL = [NAMES[6 * i : 6 * i + 6] for i in range(4)], NAMES[24:]
SETTINGS = {  # what a method needs beside its defaults; a learning rate of the size that suits it
    "lora": ("train.lr=0.01",),
    "qlora": ("train.lr=0.01", "qlora.rank=4"),
    "qalora": ("train.lr=0.02", "qalora.group=8", "qalora.rank=4"),
    "ia3": ("train.lr=0.05",),
    "bitfit": ("train.lr=0.02",),
    "pruned_bitfit": ("train.lr=0.02", "pruned_bitfit.keep=0.5"),
    "bottleneck": ("train.lr=0.01",),
    "fusion": ("train.lr=0.003", "adapters=task:{0}/to-label,text:{0}/to-write"),
    "prompt": ("train.lr=0.05", "prompt.length=5"),
    "ptuning": ("train.lr=0.01", "ptuning.length=5"),
    "prefix": ("train.lr=0.05", "prefix.length=5"),
    "increlora": ("train.lr=0.01", "increlora.interval=10", "increlora.warmup=20"),
    "mola": ("train.lr=0.01", "mola.shape=rectangle", "mola.experts=2", "mola.rank=4"),
    "full": ("train.lr=0.003",),
    "partial": ("train.lr=0.01", "partial.last=1"),
}


def line(rng):
    mood, words = rng.randrange(4), rng.choices(FILL, k=8)
    words[rng.randrange(7)] = rng.choice(GROUPS[mood])
    return " ".join(words), MOODS[mood]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(base run, task file, held-out loss and accuracy of the head alone)"""
    torch.set_num_threads(1)
    folder, rng = tmp_path_factory.mktemp("moods"), random.Random(1)
    pairs = [line(rng) for _ in range(3000)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{t} mood {m}"}) for t, m in pairs))
    task = ({"text": text, "label": "light" if mood in LIGHT else "dark"} for text, mood in map(line, [rng] * 500))
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, task)))
    words = (
        "pretrain", f"data.train={folder / 'text.jsonl'}", f"run={folder / 'base'}", "tokenizer.vocab_size=330",
        "data.length=16", "data.batch_size=32", "data.rows=padded", "data.eval_batches=4", "train.steps=900",
        "train.lr=0.003", "train.eval_every=0", "train.device=cpu", "model.hidden_size=32", "model.num_layers=2",
        "model.num_heads=4", "model.max_positions=64", "model.norm=layer", "model.mlp=plain", "model.activation=gelu",
        "model.attention_bias=true", "model.mlp_bias=true", "model.positions=learned",
    )  # fmt: skip
    assert main(list(words)) == 0
    return folder, tune(folder, "partial", "train.lr=0.01")


@pytest.fixture(scope="module")
def adapters(setting):
    """Two adapters for a fusion, of a few steps: one has read the labels, one only the texts."""
    folder, _ = setting
    few = ("train.lr=0.01", "train.steps=100")
    tune(folder, "bottleneck", *few, run="to-label")
    tune(folder, "bottleneck", *few, f"data.train={folder / 'text.jsonl'}", "data.label=", run="to-write")


def tune(folder, method, *more, run=None):
    """Held-out loss and accuracy after tuning."""
    run = folder / (run or f"{method}-{len(more)}")
    words = (
        "tune", f"base={folder / 'base'}", f"data.train={folder / 'task.jsonl'}", "data.label=label", f"run={run}",
        "data.length=16", "data.batch_size=32", "data.held_out_share=0.4", "train.steps=300", "train.eval_every=0",
        "train.device=cpu", f"method={method}",
    )  # fmt: skip
    assert main([*words, *(word.format(folder) for word in more)]) == 0
    return read_json(run / "report.json")["held_out"]["new text"]["after"]


def test_every_method_is_tried():
    assert SETTINGS.keys() == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_beats_the_head_alone(method, setting, request):
    folder, head = setting
    if method == "fusion":
        request.getfixturevalue("adapters")
    tuned = tune(folder, method, *SETTINGS[method])
    assert tuned["loss"] < 0.95 * head["loss"] and tuned["accuracy"] > head["accuracy"], (tuned, head)
