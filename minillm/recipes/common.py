"""What the recipes share: the text they read, starting and resuming a run, tables on the screen."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minillm.config import from_dict, to_dict
from minillm.data import Document, corpus_summary, read_documents, split_documents, write_tokens
from minillm.files import atomic_folder, read_json, write_json
from minillm.recipes.plots import plot_losses
from minillm.tokenizers import Tokenizer
from minillm.training import Interrupted, Records, Trainer, create_run_folder, is_main, read_run_config
from minillm.training.distributed import from_main
from minillm.training.run_folder import refuse_a_used_folder
from minillm.training.state import MAY_CHANGE

Config = TypeVar("Config")


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to use. `minillm.data.read_documents` says which files and folders it can read."""

    train: str = ""  # file or folder to learn from
    held_out: str = ""  # file or folder to measure on; when empty, a share of the documents in train
    held_out_share: float = 0.05  # of the characters, in whole documents
    text: str = "text"  # field of a record (.jsonl, .tsv, .csv) with a plain text; a number: a column, counted from 0
    prompt: str = "prompt"  # or these two: only the completion is learned
    completion: str = "completion"
    seed: int = 0  # of the split and of the order of training

    def __post_init__(self):
        wrong = [] if 0 < self.held_out_share < 1 else [f"held_out_share={self.held_out_share}: between 0 and 1"]
        wrong += [] if self.seed >= 0 else [f"seed={self.seed}: at least 0"]
        if wrong:
            raise ValueError("this data cannot be used: " + "; ".join(wrong))


@dataclass(frozen=True)
class DataConfig(CorpusConfig):
    """Which text to use, and how it becomes batches."""

    length: int = 256  # tokens in a row
    batch_size: int = 16  # rows in a batch, of all processes together
    eval_batches: int = 20  # of held-out text measured during training (0: all); the final report measures all
    isolate_documents: bool = False  # in packed rows, a document does not see the one before it

    def __post_init__(self):
        super().__post_init__()
        least = {"length": 1, "batch_size": 1, "eval_batches": 0}
        wrong = [f"{name}={getattr(self, name)}: at least {n}" for name, n in least.items() if getattr(self, name) < n]
        if wrong:
            raise ValueError("this data cannot be used: " + "; ".join(wrong))


def say(text: str = "") -> None:
    """Print, in the main process only."""
    if is_main():
        print(text, flush=True)


def read_corpus(config: CorpusConfig) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; ValueError if there is no text, or a text stands on both sides."""
    if not config.train:
        raise ValueError("data.train: which text? Name a file or a folder, for example data.train=my_folder/")
    named = {"text": config.text, "prompt": config.prompt, "completion": config.completion}
    fields = {role: int(name) if name.isdecimal() else name for role, name in named.items()}
    documents = read_documents(config.train, **fields)
    if not config.held_out:
        return split_documents(documents, config.held_out_share, config.seed)
    held_out, seen = read_documents(config.held_out, **fields), {(d.text, d.completion) for d in documents}
    if leaked := [d.name for d in held_out if (d.text, d.completion) in seen]:
        raise ValueError(
            f"{len(leaked)} of {len(held_out)} held-out documents are also in data.train={config.train}, so they would "
            f"measure memory: {', '.join(leaked[:5])}. Keep them apart, or leave data.held_out out to split by itself"
        )
    return documents, held_out


def write_data(run: Path, training: list[Document], held_out: list[Document], tokenizer: Tokenizer) -> None:
    """Tokenise both sides into `run/data`, whole or not at all."""
    summary = {}
    with atomic_folder(run / "data") as temporary:
        for name, documents in (("train", training), ("held_out", held_out)):
            try:
                tokens = len(write_tokens(documents, tokenizer, temporary / name))
            except ValueError as error:
                raise ValueError(f"data.{name}: {error}") from None
            summary[name] = corpus_summary(documents) | {"tokens": tokens}
        write_json(temporary / "corpus.json", summary)
    for name, s in summary.items():
        size = f"{s['documents']:,} documents, {s['characters']:,} characters, {s['bytes']:,} bytes"
        say(f"{name}: {size}, {s['tokens']:,} tokens, SHA-256 {s['sha256'][:12]}")


def find_run(config: Any, recipe: str, resume: bool) -> Path:
    """The run's folder, checked: unused for a new run, one that this config may continue for an old one."""
    if resume and not config.run:
        raise ValueError(f"which run? Name it: minillm {recipe} run=FOLDER --resume")
    run = Path(from_main(lambda: config.run or f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"))
    if resume:
        _check_resumable(config, saved_config(type(config), run, recipe), run)
    elif is_main():
        refuse_a_used_folder(run)
    return run


def saved_config(cls: type[Config], run: str | Path, recipe: str) -> Config:
    """The config with which `recipe` began the run in this folder."""
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"there is no run to resume: {run} does not exist (working folder: {Path.cwd()})")
    if not (run / "config.json").exists():
        raise ValueError(f"{run} has no config.json, so training never began there: start it again without --resume")
    saved = read_run_config(run)
    if saved.get("recipe") != recipe:
        raise ValueError(f"{run} is no run of minillm {recipe}; its config.json names {saved.get('recipe')!r}")
    return from_dict(cls, saved["config"], where=f"{run / 'config.json'}: ")


def _check_resumable(config: Any, saved: Any, run: Path) -> None:
    # the trainer compares the weights of the base and the vocabulary with those of the checkpoint
    may_change = {"run", "base", "model.vocab_size", *(f"train.{name}" for name in MAY_CHANGE)}
    now, then = _flat(to_dict(config)), _flat(to_dict(saved))
    wrong = [f"{k}: {now[k]!r} now, {then[k]!r} then" for k in now if k not in may_change and now[k] != then[k]]
    if wrong:
        raise ValueError(
            f"{run} was begun with another config, and resuming continues exactly that run:\n  " + "\n  ".join(wrong)
            + f"\nLeave these out (only train.{{{','.join(MAY_CHANGE)}}} may change), or start a run in another folder"
        )  # fmt: skip


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


def train(trainer: Trainer, config: Any, recipe: str, resume: bool) -> None:
    """Begin or continue the run: from here on the folder holds one."""
    run, described = trainer.run_dir, {"recipe": recipe, "config": to_dict(config)}
    if not resume:
        create_run_folder(run, described)
    else:
        step = trainer.resume()
        say(f"{run} goes on after step {step}")
        if is_main():  # what may change has changed for good
            write_json(run / "config.json", read_json(run / "config.json") | described)
    try:
        trainer.fit()
    except Interrupted:
        say(f"Go on with: minillm {recipe} run={run} --resume")
        raise


def report_timing(trainer: Trainer) -> dict[str, float]:
    """Steps, tokens and seconds of training, all interruptions together."""
    seconds = sum(record["seconds"] for record in trainer.timing.read())
    return {"steps": trainer.step, "tokens": trainer.tokens, "seconds": seconds}


def draw_losses(run: Path, title: str) -> None:
    """`plots/loss.png` from the run's metrics."""
    records = Records(run / "metrics.jsonl").read()
    curve = [(record["step"], record["loss"]) for record in records if "loss" in record]
    measured = [(record["step"], record["eval"]["loss"]) for record in records if "eval" in record]
    plot_losses(run / "plots" / "loss.png", {title: {"training": curve}}, {title: {"held-out": measured}})


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in columns as wide as needed; numbers stand on the right."""
    texts = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = [list(header), ["-" * width for width in widths], *texts]
    aligned = ([c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
