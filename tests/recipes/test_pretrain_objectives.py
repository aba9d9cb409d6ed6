"""Pretraining by each objective: what is learned, what is measured, what is refused."""

import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import minillm
from minillm.files import read_json
from minillm.models import EncoderDecoder, MaskedLM
from minillm.ops import IGNORE
from minillm.recipes import pretrain as recipe
from minillm.recipes.common import saved_config
from minillm.recipes.objective import MASK, SENTINELS, gap_places
from minillm.recipes.pretrain import PretrainConfig
from minillm.tokenizers import load_tokenizer
from minillm.training import ProgressBar, Records

KINDS = {
    "masked": ("model.kind=encoder", "model.positions=learned"),
    "spans": ("model.kind=encoder_decoder", "model.positions=relative"),
}


@pytest.fixture
def words(texts, sizes):
    """`words(objective, *more)`: the command, apart from the run."""

    def make(objective: str, *more: str) -> list[str]:
        return ["pretrain", f"data.train={texts / 'text'}", *sizes, *KINDS[objective], *more]

    return make


@pytest.fixture
def trained(words, cli, tmp_path):
    """`trained(objective, *more)`: a finished run."""

    def run(objective: str, *more: str):
        code, _, error = cli(*words(objective, *more), f"run={tmp_path / 'run'}")
        assert code == 0, error
        return tmp_path / "run"

    return run


@torch.no_grad()
def by_hand(model, batch, row: int) -> list[float]:
    """-log p of each label of a row, by the model's logits."""
    one = {name: tensor[row : row + 1] for name, tensor in batch.items() if name != "labels"}
    sources = (one["source"], one["tokens"]) if "source" in one else (one["tokens"],)
    masks = {name: one[name] for name in ("source_mask", "mask") if name in one}
    log_p = model(*sources, **masks)[0].double().log_softmax(-1)
    return [-log_p[at, label].item() for at, label in enumerate(batch["labels"][row].tolist()) if label != IGNORE]


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("objective", KINDS)
def test_a_run_is_measured_on_what_its_model_was_asked(objective, rows, trained, held_out):
    run = trained(objective, f"data.rows={rows}")
    data, tokenizer, model = held_out(run)
    assert isinstance(model, {"masked": MaskedLM, "spans": EncoderDecoder}[objective])
    nats, text_nats, num_bytes = [], 0.0, 0
    for batch in data.batches():
        for row in range(len(batch["labels"])):
            found = by_hand(model, batch, row)
            labels = [label for label in batch["labels"][row].tolist() if label != IGNORE]
            sizes = [len(tokenizer.token_bytes(label)) for label in labels]
            nats += found
            text_nats += sum(value for value, size in zip(found, sizes, strict=True) if size)
            num_bytes += sum(sizes)
    report = read_json(run / "report.json")["held_out"]
    assert report["tokens"] == len(nats)
    assert report["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(text_nats / math.log(2) / num_bytes, rel=1e-5)
    length = len(data.file)
    assert abs(report["text_tokens"] - 0.15 * length) < 0.04 * length  # the share that is asked for


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("objective", KINDS)
def test_the_places_asked_for_are_those_of_the_labels(objective, rows, trained, held_out):
    data, tokenizer, _ = held_out(trained(objective, f"data.rows={rows}", "train.steps=1"))
    labels = torch.cat([batch["labels"][batch["labels"] != IGNORE] for batch in data.text_batches()]).numpy()
    if objective == "spans":  # sentinels and the ends of the targets are left out
        assert not set(labels.tolist()) & set(tokenizer.special_ids.values())
    np.testing.assert_array_equal(data.file.tokens[data.text_places()], labels)


def test_gaps_by_hand():
    """Text 5 6 7 8 9, of which 6 7 and 9 are cut out: 5 <100> 8 <101> </s> and <100> 6 7 <101> 9 </s>."""
    assert gap_places([5, 100, 8, 101, 1], [100, 6, 7, 101, 9, 1], (100, 101, 102)).tolist() == [1, 2, 4]


def test_measuring_is_alike_and_training_is_not(trained, held_out):
    run = trained("masked", "train.steps=1")
    data, *_ = held_out(run)
    first, second = ([batch["labels"] for batch in data.batches()] for _ in range(2))
    assert all(map(torch.equal, first, second))
    loader = data._loader(2)
    rows = {}
    for _ in range(3 * len(loader.begins)):
        for row in next(loader)["labels"]:
            rows.setdefault(tuple(row[row != IGNORE].tolist()), 0)
    assert len(rows) > 1.5 * len(loader.begins)  # three epochs, and each hides other tokens


@pytest.mark.parametrize("objective", KINDS)
def test_more_may_be_hidden_in_training_but_as_much_is_measured(objective, trained, held_out):
    run = trained(objective, "hide=0.4", "train.log_every=1")
    data, *_ = held_out(run)
    records = [record for record in Records(run / "metrics.jsonl").read() if "loss" in record]
    tokens = records[-1]["tokens"]  # of 6 steps of 4 rows of 32
    if objective == "spans":
        assert tokens == 6 * 4 * (13 + 4 + 1)  # round(12.8) tokens in round(13 / 3) spans, each with a sentinel; </s>
    else:
        assert abs(tokens - 0.4 * 6 * 4 * 32) < 60  # 3 sigma are 40
    report = read_json(run / "report.json")["held_out"]
    assert abs(report["text_tokens"] - 0.15 * len(data.file)) < 0.04 * len(data.file)


def test_an_encoder_reads_rows_as_it_will_read_texts(trained, held_out):
    data, tokenizer, _ = held_out(trained("masked", "train.steps=1"))
    batch = next(data.batches())
    assert (batch["tokens"][:, 0] == tokenizer.bos_id).all() and (batch["tokens"][0, -1] == tokenizer.eos_id)
    assert tokenizer.with_specials([7])[0] == [tokenizer.bos_id, 7, tokenizer.eos_id]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "characters"])
def test_a_new_tokenizer_gets_what_the_objective_needs(kind, trained):
    more = ["tokenizer.kind=" + kind, "train.steps=1"] + ["tokenizer.vocab_size=340"] * (kind == "bpe")
    run = trained("spans", *more)
    tokenizer = load_tokenizer(run / "model")
    assert [name for name in tokenizer.special_ids if name in SENTINELS] == list(SENTINELS)
    assert minillm.load(run / "model").config.decoder_start_id == tokenizer.pad_id
    text = "the cat sat <extra_id_0> on <mask>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values()) - {tokenizer.unk_id}
    assert kind == "characters" or tokenizer.decode(ids) == text


def test_special_symbols_that_are_asked_for(trained):
    tokenizer = load_tokenizer(trained("masked", "tokenizer.special_symbols=<user>,<mask>", "train.steps=1") / "model")
    assert {"<user>", MASK} <= set(tokenizer.special_ids) and tokenizer.mask_id == tokenizer.special_ids[MASK]


def test_whole_words_are_hidden_whole(trained, held_out):
    run = trained("masked", "whole_words=true", "tokenizer.kind=bpe", "tokenizer.vocab_size=330")
    data, tokenizer, _ = held_out(run)
    parts = 0
    for batch in data.batches():
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
            hidden = labels != IGNORE
            text = torch.where(hidden, labels, tokens)
            for at in range(2, len(text) - 1):
                inside = not tokenizer.starts_word(text[at].item()) and not tokenizer.id_to_piece(
                    text[at - 1]
                ).endswith("\n")
                special = {text[at].item(), text[at - 1].item()} & set(tokenizer.special_ids.values())
                if inside and not special:
                    parts += 1
                    assert hidden[at] == hidden[at - 1]
    assert parts > 50


class Stop(ProgressBar):
    def on_step(self, trainer, record) -> None:
        if trainer.step == 3:
            os.kill(os.getpid(), 2)


@pytest.mark.parametrize("objective", KINDS)
def test_an_interrupted_run_resumes_to_the_same_bits(objective, words, cli, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli(*words(objective), f"run={whole}")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "ProgressBar", Stop)
        assert cli(*words(objective), f"run={run}")[0] == 130
    assert cli("pretrain", f"run={run}", "--resume")[0] == 0
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", KINDS)
def test_two_processes_pretrain_as_one(objective, words, cli, tmp_path):
    """The same sums in another order, in float32: 1e-5 relative after four steps."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    command = words(objective, "model.dropout=0", "train.steps=4")
    assert cli(*command, f"run={alone}")[0] == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "minillm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command, f"run={pair}"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = ([r.get("eval", r) for r in Records(run / "metrics.jsonl").read()] for run in (pair, alone))
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "more", "match"),
    [
        ("masked", ["objective=next"], "objective=next is for model.kind=decoder, which predicts each token .*; "
         "objective=masked is for model.kind=encoder"),
        ("spans", ["objective=masked"], "objective=masked is for model.kind=encoder, .*; objective=spans is for"),
        ("masked", ["model.kind=decoder", "objective=spans"], "objective=spans is for model.kind=encoder_decoder"),
        ("masked", ["data.length=48"], "data.length=48 and the special tokens around each row make 50 tokens, more "
         "than model.max_positions=48"),
        ("masked", ["data.isolate_documents=true"], "isolate_documents=true is for objective=next"),
        ("masked", ["model.kind=decoder", "hide=0.3"], "hide=0.3 is for objective=masked and spans, not next"),
        ("spans", ["hide=1"], "hide=1.0: a share between 0 and 1"),
        ("spans", ["whole_words=true"], "whole_words=true is for objective=masked, not spans"),
        ("masked", ["whole_words=true"], "none of the 260 pieces begins with"),
        ("masked", ["data.train={notes}"], "objective=masked learns from plain text, and data.train has prompts"),
        ("masked", ["tokenizer.kind=bpe", "tokenizer.special_symbols=<a>", "tokenizer.folder={base}"],
         "uses a tokenizer as it is: leave special_symbols out"),
        ("spans", ["data.length=700", "model.max_positions=800", "data.batch_size=1"],
         "hide=0.15 cuts up to 36 spans out of data.length=700 tokens, and the tokenizer has 32 sentinels"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(objective, more, match, words, cli, texts, base, tmp_path):
    more = [word.format(notes=texts / "notes.jsonl", base=base) for word in more]
    code, _, error = cli(*words(objective, *more), f"run={tmp_path / 'run'}")
    assert code == 2 and re.search(match, error, re.DOTALL), error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask_is_refused(words, cli, base, tmp_path):
    command = [word for word in words("masked") if not word.startswith("tokenizer.kind")]
    code, _, error = cli(*command, f"tokenizer.folder={base}", f"run={tmp_path / 'run'}")
    assert code == 2 and "the tokenizer has no <mask>: let it be trained with tokenizer.special_symbols=<mask>" in error


def test_a_preset_is_a_beginning(texts, cli, tmp_path):
    run = tmp_path / "run"
    more = ["train.steps=1", "data.batch_size=1", "data.length=40", "train.precision=float32", "tokenizer.kind=bytes"]
    code, _, error = cli("pretrain", "--preset", "nano-encoder", f"data.train={texts / 'text'}", *more, f"run={run}")
    assert code == 0, error
    config = saved_config(PretrainConfig, run, "pretrain")
    assert (config.objective, config.model.hidden_size, config.train.beta2) == ("masked", 64, 0.98)
    assert (config.data.length, config.train.steps) == (40, 1)
    code, _, error = cli("pretrain", "--preset", "nano-encodr", f"run={run}")
    assert code == 2 and "there is no preset 'nano-encodr'; did you mean nano-encoder or" in error
    code, _, error = cli("pretrain", "--preset", "nano-encoder", "--resume", f"run={run}")
    assert code == 2 and "--preset nano-encoder has no effect on a run that goes on: leave it out" in error


def test_the_run_is_taken_back_where_training_cannot_begin(words, cli, base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    command = [word for word in words("spans") if not word.startswith("tokenizer.kind")]
    code, _, error = cli(*command, f"tokenizer.folder={tmp_path / 'tokenizer'}", f"run={run}")
    assert code == 2 and "the tokenizer has 0 sentinels" in error and not run.exists()
