"""The card of a model in the box: what it is, what it learned from, how well, and at what cost."""

import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from minillm.files import atomic_write
from minillm.models import ModelConfig

CARD = "card.json"
TASKS = {
    "next": (
        "A decoder: it predicts the next piece of a text.",
        "Bits per byte of the whole held-out works, in rows of {length} pieces",
        "gzip and xz compress the held-out works alone (gzip could use nothing further back than 32 kB); "
        "`xz_after_the_training_text` is what the held-out works add to a file of the training text.",
    ),
    "masked": (
        "An encoder: it names pieces that are hidden from it, seeing both sides.",
        "Bits per byte of the hidden pieces: 15 % of the held-out works, drawn once; in training {hide:.0%}",
        "The n-grams predict exactly the same pieces, from the true text on their left.",
    ),
    "spans": (
        "An encoder-decoder: it writes what stood in the gaps of a text.",
        "Bits per byte of the pieces cut out: 15 % of the held-out works, in spans of 3 on average, drawn once; "
        "in training {hide:.0%}",
        "The n-grams predict exactly the same pieces, from the true text on their left.",
    ),
}


def write_card(folder: Path, name: str, model: ModelConfig, facts: dict[str, Any], manifest: dict[str, Any]) -> None:
    """README.md, from the facts of card.json and the manifest."""
    what, measured, note = TASKS[facts["objective"]]
    train, environment = facts["training"], facts["environment"]
    about = f"""{what} {model.num_layers} layers of {model.hidden_size} features and {model.num_heads} heads,
        {model.vocab_size} pieces, texts of at most {model.max_positions} of them. A small model for learning and for
        experiments: it knows the words and the grammar of old books, and little of the world. It is not fit to decide
        anything about people."""
    made = f"""{train["steps"]:,} steps of {train["batch_size"]} rows of {train["length"]} pieces, {train["labels"]:,}
        of them predicted, in {_duration(train["seconds"])} on {_hardware(environment)}, in {train["precision"]}, with
        torch {environment["torch"]}; commit {environment["commit"]}. The training curve, all settings and the
        environment are in `card.json`."""
    text = f"""{manifest["language"].capitalize()}. Every work is in `works.tsv` with its source, licence, SHA-256 and
        size; the texts themselves are not part of minillm. The held-out works were never seen in training."""
    parts = [
        f"# {name}",
        _paragraph(about),
        "```python\nimport minillm\nfrom minillm.tokenizers import load_tokenizer\n\n"
        f'model, tokenizer = minillm.load("{name}"), load_tokenizer("{name}")\n```',
        "## How well it predicts",
        _paragraph(f"{measured.format(**train)}; fewer are better. {note}"),
        _table(("model", "bits per byte"), _results(facts)),
        "## How it was trained",
        _paragraph(made),
        "## What it learned from",
        _paragraph(text),
        _table(("part", "works", "bytes", "licences"), _parts(manifest)),
    ]
    atomic_write(folder / "README.md", "\n\n".join(parts) + "\n")


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _hardware(environment: dict[str, Any]) -> str:
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    return ", ".join(environment["gpus"]) or f"{threads} of a CPU ({environment['processor']})"


def _results(facts: dict[str, Any]) -> list[tuple[str, str]]:
    own = facts["held_out"]["bits_per_byte"], facts["held_out_in_bfloat16"]["bits_per_byte"]
    rows = [("**this model**", f"**{own[1]:.3f}** ({own[0]:.4f} before rounding to bfloat16, {own[1]:.4f} after)")]
    return rows + [(name, f"{value:.3f}") for name, value in facts["baselines_bits_per_byte"].items()]


def _parts(manifest: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row for each side and kind of licence."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for side in ("train", "held_out"):
        for work in manifest[side]["works"]:
            groups[side.replace("_", "-"), work["licence"].split(" (")[0].split(":")[0]].append(work["bytes"])
    return [(side, str(len(sizes)), f"{sum(sizes):,}", licence) for (side, licence), sizes in groups.items()]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
