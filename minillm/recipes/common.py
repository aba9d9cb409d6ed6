"""What the recipes share: the text they read, starting and resuming a run, tables on the screen."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from minillm.config import from_dict, seed_flaw, to_dict
from minillm.data import Document, corpus_summary, read_documents, split_documents, write_tokens
from minillm.files import atomic_folder, read_json, write_json
from minillm.recipes.locate import quote
from minillm.recipes.plots import plot_losses
from minillm.tokenizers import Tokenizer
from minillm.training import (
    Interrupted,
    Records,
    Trainer,
    create_run_folder,
    is_main,
    list_checkpoints,
    read_run_config,
)
from minillm.training.distributed import from_main
from minillm.training.run_folder import refuse_a_used_folder
from minillm.training.state import MAY_CHANGE

Config = TypeVar("Config")
PREPARED = ("tokenizer", "data", "base", "under", "kept.json", "environment.json")  # in a run before it begins
NEARLY = 0.98  # a held-out loss above this share of ln(vocabulary) is that of a model that learned nothing


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to use. `minillm.data.read_documents` says which files and folders it can read."""

    train: str = ""  # file or folder to learn from
    held_out: str = ""  # file or folder to measure on; when empty, a share of the documents in train
    held_out_share: float = 0.05  # of the characters, in whole documents
    text: str = "text"  # field of a record (JSON or table) with a plain text; a number: a column, counted from 0
    prompt: str = "prompt"  # or these two: only the completion is learned
    completion: str = "completion"
    label: str = ""  # field with a text's class, such as label: then a classifier is trained (minillm tune)
    seed: int = 0  # of the split and of the order of training

    def __post_init__(self):
        wrong = [] if 0 < self.held_out_share < 1 else [f"held_out_share={self.held_out_share}: between 0 and 1"]
        wrong += seed_flaw(self.seed)
        if self.held_out and self.held_out_share != CorpusConfig.held_out_share:
            wrong.append(f"held_out_share={self.held_out_share} has no effect beside held_out: give one of them")
        if wrong:
            raise ValueError("this data cannot be used: " + "; ".join(wrong))


@dataclass(frozen=True)
class DataConfig(CorpusConfig):
    """Which text to use, and how it becomes batches."""

    length: int = 256  # tokens in a row
    rows: Literal["auto", "packed", "padded"] = "auto"  # auto: padded, one document a row, if any has a prompt
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
    if config.label:  # a labelled text is read as a prompt and its completion
        named = {"text": "", "prompt": config.text, "completion": config.label}
    fields = {role: int(name) if name.isdecimal() else name for role, name in named.items()}
    numbers = bool(config.label)
    documents = read_documents(config.train, **fields, numbers=numbers)
    held_out = read_documents(config.held_out, **fields, numbers=numbers) if config.held_out else []
    _check_fields_count(config, documents + held_out)
    if not config.held_out:
        return split_documents(documents, config.held_out_share, config.seed)
    seen = {(d.text, d.completion) for d in documents}
    if leaked := [d.name for d in held_out if (d.text, d.completion) in seen]:
        raise ValueError(
            f"{len(leaked)} of {len(held_out)} held-out documents are also in data.train={config.train}, so they would "
            f"measure memory: {', '.join(leaked[:5])}. Keep them apart, or leave data.held_out out to split by itself"
        )
    return documents, held_out


def _check_fields_count(config: CorpusConfig, documents: list[Document]) -> None:
    if config.label:
        return
    defaults = {"prompt": CorpusConfig.prompt, "completion": CorpusConfig.completion}
    given = [f"data.{name}={getattr(config, name)}" for name in defaults if getattr(config, name) != defaults[name]]
    if given and all(document.completion is None for document in documents):
        files = " and ".join(filter(None, (config.train, config.held_out)))
        raise ValueError(
            f"{' and '.join(given)} have no effect: no record of {files} has a prompt and a completion. "
            "Leave them out, or bring records (.jsonl, .json, .tsv, .csv)"
        )


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
    else:
        from_main(lambda: refuse_a_used_folder(run))
    return run


@contextlib.contextmanager
def taken_back_if_refused(run: Path) -> Iterator[None]:
    """Where a run is refused before it has begun, delete what was prepared for it; what was there before stays."""
    before = {run, *run.iterdir()} if run.is_dir() else set()
    try:
        yield
    except BaseException:
        if is_main() and run.is_dir() and not (run / "config.json").exists():
            for part in {run / name for name in PREPARED} - before:
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
            if run not in before and not any(run.iterdir()):
                run.rmdir()
        raise


def saved_config(cls: type[Config], run: str | Path, recipe: str) -> Config:
    """The config with which `recipe` began the run in this folder."""
    run = Path(run)
    if run.is_file():
        raise ValueError(f"there is no run to resume: {run} is a file; name the run's folder")
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
        if (run / "report.json").is_file() and not list_checkpoints(run):
            raise ValueError(f"{run} is finished, but its checkpoints/ are gone, so it cannot go on: use it as it is")
        step = trainer.resume()
        say(f"{run} goes on after step {step}")
        # what may change has changed for good
        from_main(lambda: write_json(run / "config.json", read_json(run / "config.json") | described))
    try:
        trainer.fit()
    except Interrupted:
        say(f"Go on with: minillm {recipe} run={quote(run)} --resume")
        raise
    if trainer.stopped:
        say(f"stopped at step {trainer.step}: {trainer.stopped}")
    if trainer.weights_step != trainer.step:
        say(f"the result are the weights of step {trainer.weights_step}, the best of those evaluated")


def report_timing(trainer: Trainer) -> dict[str, float]:
    """Steps, the one whose weights are the result, tokens and seconds of training, all interruptions together."""
    seconds = sum(record["seconds"] for record in trainer.timing.read())
    return {
        "steps": trainer.step,
        "weights_of_step": trainer.weights_step,
        "tokens": trainer.tokens,
        "seconds": seconds,
    }


def doubts(began: float, ended: float, held_out: float, vocab_size: int, what: str = "token") -> list[str]:
    """What went wrong with a run by its losses: at its beginning and end, and on held-out text."""
    found, uniform = [], math.log(vocab_size)
    if not ended <= began:  # also if it is not a number
        found.append(
            f"the loss ended higher than it began ({began:.4f}, then {ended:.4f}): try a lower learning rate, or look "
            "for broken text"
        )
    if not held_out < NEARLY * uniform:
        found.append(
            f"the held-out loss of {held_out:.4f} is no better than guessing every {what} alike (ln {vocab_size} = "
            f"{uniform:.4f}): the model has learned next to nothing; train longer or with another learning rate"
        )
    for line in found:
        say(f"warning: {line}")
    return found


def began_and_ended(run: Path) -> tuple[float, float]:
    """The mean training loss in the first and in the last tenth of a run's records."""
    losses = [record["loss"] for record in Records(run / "metrics.jsonl").read() if "loss" in record]
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


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
