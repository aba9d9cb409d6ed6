"""The demo's numbers as tables and samples. Every number comes from `report.json`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minillm.files import read_json
from minillm.generation import generate_text, sampler
from minillm.models import Decoder
from minillm.recipes.demo_plots import picture
from minillm.recipes.report import Block, Heading, Listing, Paragraph, Table, write_report
from minillm.tokenizers import Tokenizer

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 20": {"top_k": 20},
    "top-p 0.8": {"top_p": 0.8},
}
HEADER = (
    *("method", "trainable (share)", "documentation: loss (perplexity)", "source: loss (perplexity)", "gap closed"),
    *("seconds", "peak memory (added)", "artefact"),
)


def rows(before: Mapping[str, float], methods: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The methods' facts with what follows from them: share of trainable values, share of full tuning's gain."""
    full = next(method for method in methods if method["method"] == "full")
    gain = before["source"] - full["losses"]["source"]
    return [
        method
        | {
            "share": method["trainable"] / method["parameters"],
            "gap_closed": (before["source"] - method["losses"]["source"]) / gain,
            "training_adds": (method["peak_memory"] or 0) - (method["memory_before"] or 0),
        }
        for method in methods
    ]


def samples(
    base: Decoder, adapted: Decoder, tokenizer: Tokenizer, prompt: str, new_tokens: int, seed: int
) -> list[dict[str, str]]:
    """What both models say after `prompt`, by sampler; the same seed for both."""
    found = []
    for name, settings in SAMPLERS.items():
        said = {"sampler": name, "prompt": prompt}
        for which, model in (("before", base), ("after", adapted)):
            draw = sampler(**settings, generator=torch.Generator().manual_seed(seed))
            said[which] = generate_text(model, tokenizer, [prompt], max_new_tokens=new_tokens, sampler=draw)[0]
        found.append(said)
    return found


def table(facts: Mapping[str, Any]) -> Table:
    """One row for the base, one for each method."""
    base = facts["base"]
    size = f"{base['parameters']['total'] * 4 / 1e6:.2f} MB"  # float32
    lines = [("base", "0 (0 %)", *_losses(base["losses"]), "0 %", "-", "-", size)]
    for row in facts["methods"]:
        lines.append(
            (
                row["method"],
                f"{row['trainable']:,} ({100 * row['share']:.1f} %)",
                *_losses(row["losses"]),
                f"{100 * row['gap_closed']:.0f} %",
                f"{row['seconds']:.1f}",
                f"{row['peak_memory'] / 1e6:.0f} MB ({row['training_adds'] / 1e6:.0f} MB)"
                if row["peak_memory"]
                else "-",
                f"{row['artefact_bytes'] / 1e6:.2f} MB",
            )
        )
    return Table(HEADER, lines)


def _losses(losses: Mapping[str, float]) -> list[str]:
    return [f"{losses[name]:.3f} ({math.exp(losses[name]):.1f})" for name in ("documentation", "source")]


def as_text(facts: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = [HEADER, *table(facts).rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join("   " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def write(run: Path) -> None:
    """`report.md` and `report.html` from `report.json` and the pictures."""
    write_report(run, blocks(read_json(run / "report.json"), read_json(run / "environment.json")))


def blocks(facts: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Block]:
    """The report, top to bottom."""
    base, tokenizer = facts["base"], facts["tokenizer"]
    lora = next(row for row in facts["methods"] if row["method"] == "LoRA")
    corpora = [
        (f"{name}, {part.replace('_', '-')}", *(f"{found[size]:,}" for size in ("documents", "bytes", "characters")),
         found["sha256"][:16])
        for name, corpus in facts["corpora"].items()
        for part in ("training", "held_out")
        for found in (corpus[part],)
    ]  # fmt: skip
    parts = [(part, f"{count:,}") for part, count in base["parameters"].items() if count]
    efficiency = ", ".join(f"{n.split()[0]} {x:.2f}" for n, x in tokenizer["characters_per_token"].items())
    return [
        Heading("One model, two domains, three ways to tune", 1),
        Paragraph(
            f"A decoder learned Python's documentation and was then adapted to Python source code. LoRA trained "
            f"{100 * lora['share']:.1f} % as many values as the model has and closed {100 * lora['gap_closed']:.0f} % "
            f"of the held-out gap that full fine-tuning closes. All of it took {facts['seconds']:.0f} s and at most "
            f"{facts['peak_memory'] / 1e6:.0f} MB in one process."
        ),
        table(facts),
        Paragraph(
            "Losses are nats per token on held-out documents, perplexity is e^loss; the first row is before tuning. "
            "Gap closed: the share of full fine-tuning's gain on source code. Peak memory is that of the whole process "
            "(Python and PyTorch included) in which the method ran alone; added: how far that lies above the same "
            "process with the model loaded. Artefact: the file that a method leaves behind."
        ),
        *(picture(name, facts) for name in ("trade_off", "loss", "learning_rate")),
        Heading("The text"),
        Paragraph(
            "It comes with every Python " + f"({environment['python']} here): " + "; ".join(
                f"{name}: {corpus['what']}" for name, corpus in facts["corpora"].items())
            + ". Whole documents are held out, and no paragraph of 80 characters or more stands on both sides."
        ),
        Table(("part", "documents", "bytes", "characters", "sha256"), corpora),
        Heading("The tokenizer"),
        Paragraph(
            f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, trained on the documentation only. Characters per "
            f"token on held-out text: {efficiency}."
        ),
        Listing(f"{tokenizer['sentence']}\n{' | '.join(tokenizer['pieces'])}\n{' '.join(map(str, tokenizer['ids']))}"),
        Heading("The base model"),
        Table(("part", "parameters"), parts),
        picture("attention", facts),
        Heading("How it speaks"),
        picture("next_token", facts),
        *(block for sample in facts["samples"] for block in _sample(sample)),
        Heading("The adapter"),
        Paragraph(
            f"Saved ({lora['artefact_bytes']:,} bytes), loaded into a fresh base and merged into its weights. The "
            f"largest difference between merged and unmerged logits is {facts['merged_minus_unmerged']:.2e}: rounding."
        ),
    ]  # fmt: skip


def _sample(sample: Mapping[str, str]) -> list[Block]:
    said = [Listing(f"[{which}] {sample['prompt']}{sample[which]}") for which in ("before", "after")]
    return [Paragraph(f"{sample['sampler']}, before and after LoRA:"), *said]
