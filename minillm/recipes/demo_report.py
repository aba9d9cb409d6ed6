"""The demo's numbers as tables, pictures and samples. Every number comes from `report.json`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minillm.files import read_json
from minillm.generation import generate_text, sampler, temperature, top_k, top_p
from minillm.models import Decoder, attention_maps
from minillm.recipes import plots
from minillm.recipes.report import Block, Heading, Listing, Paragraph, Picture, Table, write_report
from minillm.tokenizers import Tokenizer
from minillm.training import Records

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 20": {"top_k": 20},
    "top-p 0.8": {"top_p": 0.8},
}
HEADER = (
    *("method", "trainable", "share", "documentation: loss", "perplexity", "source: loss", "perplexity", "gap closed"),
    *("seconds", "peak memory", "training adds", "artefact"),
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


def draw(
    run: Path,
    base: Decoder,
    adapted: Decoder,
    tokenizer: Tokenizer,
    sentence: str,
    prompt: str,
    methods: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """All pictures, into `run/plots`."""
    records = {"pretraining": Records(run / "pretrain" / "metrics.jsonl").read()}
    records |= {name: Records(run / name.replace(" ", "-") / "metrics.jsonl").read() for name in methods}

    def curves(key: str, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        return {name: [(record["step"], record[key]) for record in records[name]] for name in names}

    folder = run / "plots"
    panels = {"Pretraining on documentation": curves("loss", ["pretraining"])}
    plots.plot_losses(folder / "loss.png", panels | {"Tuning to source code": curves("loss", methods)})
    plots.plot_learning_rate(folder / "learning_rate.png", curves("lr", list(records)))
    table = facts["methods"]
    panels = {
        title: (facts["base"]["losses"][domain], [row["losses"][domain] for row in table])
        for title, domain in (("Source code: the gain", "source"), ("Documentation: the forgetting", "documentation"))
    }
    plots.plot_trade_off(folder / "trade_off.png", [row["method"] for row in table], panels)
    ids = torch.tensor([tokenizer.encode(sentence)])
    last = attention_maps(base, ids)[-1][0]  # (H, T, T)
    heads = {f"last layer, head {head + 1}": last[head].numpy() for head in range(min(2, len(last)))}
    plots.plot_attention(folder / "attention.png", tokenizer.pieces(sentence), heads)
    _draw_next_token(folder / "next_token.png", adapted, tokenizer, prompt)


@torch.no_grad()
def _draw_next_token(path: Path, model: Decoder, tokenizer: Tokenizer, prompt: str) -> None:
    logits = model(torch.tensor([tokenizer.encode(prompt)]))[:, -1]
    filters = {
        "none": logits,
        "temperature 0.5": temperature(logits, 0.5),
        "top-k 5": top_k(logits, 5),
        "top-p 0.5": top_p(logits, 0.5),
    }
    shown = logits[0].topk(min(15, logits.shape[-1])).indices
    distributions = {name: kept.softmax(-1)[0, shown].tolist() for name, kept in filters.items()}
    plots.plot_next_token(path, [tokenizer.id_to_piece(i) for i in shown.tolist()], distributions, prompt)


def table(facts: Mapping[str, Any]) -> Table:
    """One row for the base, one for each method."""
    base = facts["base"]
    total = base["parameters"]["total"]
    lines = [
        ("base, not tuned", "0", "0 %", *_losses(base["losses"]), "0 %", "-", "-", "-", f"{total * 4 / 1e6:.2f} MB")
    ]
    for row in facts["methods"]:
        lines.append(
            (
                row["method"],
                f"{row['trainable']:,}",
                f"{100 * row['share']:.1f} %",
                *_losses(row["losses"]),
                f"{100 * row['gap_closed']:.0f} %",
                f"{row['seconds']:.1f}",
                f"{row['peak_memory'] / 1e6:.0f} MB",
                f"{row['training_adds'] / 1e6:.0f} MB",
                f"{row['artefact_bytes'] / 1e6:.2f} MB",
            )
        )
    return Table(HEADER, lines)


def _losses(losses: Mapping[str, float]) -> list[str]:
    return [
        text
        for name in ("documentation", "source")
        for text in (f"{losses[name]:.3f}", f"{math.exp(losses[name]):.1f}")
    ]


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
            "(Python and PyTorch included) in which the method ran alone; training adds: how far that lies above the "
            "same process with the model loaded. Artefact: the file that a method leaves behind."
        ),
        Picture("plots/trade_off.png", _trade_off_alt(facts),
                "What each method gains on the new domain, and forgets of the old."),
        Picture("plots/loss.png", "Training loss falling with the steps, for pretraining and for each method.",
                "Training loss: each step (faint) and its running mean."),
        Picture("plots/learning_rate.png", "Learning rate rising in the warm-up and falling along a cosine.",
                "The learning rate of each run."),
        Heading("The text"),
        Paragraph(
            "It comes with every Python " + f"({environment['python']} here): " + "; ".join(
                f"{name}: {corpus['what']}" for name, corpus in facts["corpora"].items())
            + ". Whole documents are held out, and no paragraph stands on both sides."
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
        Picture("plots/attention.png",
                "Heat maps of attention: each row is a token, each column a token it reads from.",
                f"What two heads of the base's last layer read, token by token, in: {tokenizer['sentence']}"),
        Heading("How it speaks"),
        Picture("plots/next_token.png", "Bars of the next token's probability, without and with each sampling filter.",
                "The tuned model's next token, before and after each filter; a cross marks what the filter removed."),
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


def _trade_off_alt(facts: Mapping[str, Any]) -> str:
    changes = [
        f"{row['method']}: source {facts['base']['losses']['source']:.2f} to {row['losses']['source']:.2f}, "
        f"documentation {facts['base']['losses']['documentation']:.2f} to {row['losses']['documentation']:.2f}"
        for row in facts["methods"]
    ]
    return "Held-out loss before and after. " + "; ".join(changes) + "."
