"""The scoreboard as a table on the screen, in Markdown and CSV, and as a report."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.config import to_dict
from minillm.files import atomic_write, read_json, write_json
from minillm.recipes.compare import draw
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.compare.forgetting import HeldOut
from minillm.recipes.compare.intervals import LEVEL
from minillm.recipes.compare.judge import Judge
from minillm.recipes.compare.problem import Problem
from minillm.recipes.compare.study import Study
from minillm.recipes.report import Block, Heading, Paragraph, Table, to_markdown, write_report

Entry = Mapping[str, Any]
DRAWS = {False: 500, True: 100}  # of the bootstrap; fewer where a score compares texts, which takes long
SPLITS = {"train": "learn from", "valid": "choose by", "test": "report"}
NONE = "-"
COLUMNS = {  # what stands above a column -> an entry's cell
    "method": lambda e: e["title"],
    "rate": lambda e: _number(e, "rate", "{:g}"),
    "score": lambda e: _score(e),
    f"{LEVEL} %": lambda e: _interval(e, "interval", "{:.3f} to {:.3f}"),
    "less full": lambda e: _interval(e, "to_full", "{:+.3f} to {:+.3f}"),
    "trained": lambda e: _number(e, "trainable", "{:,}"),
    "share": lambda e: _number(e, "share", "{:.2%}"),
    "artefact": lambda e: _number(e, "artefact_bytes", "{:,.0f} kB", 1e-3),
    "step": lambda e: _number(e, "step_cpu_seconds", "{:.1f} ms", 1e3),
    "memory": lambda e: _number(e, "memory_added", "{:.1f} MB", 1e-6),
    "inference": lambda e: _number(e, "unmerged", "{:.2f} x"),
    "merged": lambda e: _number(e, "merged", "{:.2f} x"),
    "forgets, on": lambda e: _number(e, "forgetting_on", "{:+.3f}"),
    "off": lambda e: _off(e),
    "energy": lambda e: _number(e, "joules", "{:.3g} J"),
}


def _number(entry: Entry, key: str, form: str, unit: float = 1) -> str:
    return form.format(entry[key] * unit) if entry.get(key) is not None else NONE


def _interval(entry: Entry, key: str, form: str) -> str:
    return form.format(*entry[key]) if key in entry else NONE


def _score(entry: Entry) -> str:
    if "score" not in entry:
        return entry["status"]
    return f"{entry['score']:.3f}" + (f" ± {entry['std']:.3f}" if entry["std"] is not None else "")


def _off(entry: Entry) -> str:
    return "0" if entry.get("forgetting_off") == 0 else _number(entry, "forgetting_off", "{:+.3f}")


def table(entries: Sequence[Entry]) -> Table:
    """A row for each entry; one that failed, or that the base cannot take, has its reason below the table."""
    return Table(tuple(COLUMNS), [tuple(cell(entry) for cell in COLUMNS.values()) for entry in entries])


def reasons(entries: Sequence[Entry]) -> list[str]:
    """Why cells are empty."""
    return [f"{entry['title']}: {entry['reason']}" for entry in entries if "reason" in entry]


def as_text(entries: Sequence[Entry], metric: str) -> str:
    """The table for a terminal."""
    found = table(entries)
    header = [metric if name == "score" else name for name in found.header]
    widths = [max(map(len, column)) for column in zip(header, *found.rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *found.rows):
        first, *rest = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]))
    return "\n".join(line.rstrip() for line in (*lines, *(f"- {why}" for why in reasons(entries))))


def as_csv(entries: Sequence[Entry]) -> str:
    """Every number as it is, for other programs."""
    several = ("scores", "seeds", "curves", "metrics")
    keys = list(dict.fromkeys(key for entry in entries for key in entry if key not in several))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for entry in entries:
        cells = [entry.get(key) for key in keys]
        writer.writerow(["" if c is None else " ".join(map(repr, c)) if isinstance(c, tuple) else c for c in cells])
    return text.getvalue()


def write(
    study: Study, entries: Sequence[Entry], config: CompareConfig, problem: Problem, judge: Judge, held_out: HeldOut
) -> None:
    """results.json, table.md, table.csv, plots/ and the report."""
    facts = {"base": config.base, "task": problem.task.name, "metric": judge.metric, "config": to_dict(config)}
    write_json(study.folder / "results.json", facts | {"rows": list(entries)})
    atomic_write(study.folder / "table.csv", as_csv(entries))
    notes = "".join(f"\n- {why}" for why in reasons(entries))
    atomic_write(study.folder / "table.md", to_markdown(table(entries)) + "\n" + notes + ("\n" if notes else ""))
    pictures = draw.draw(study.folder, entries, judge.metric)
    machine = read_json(study.folder / "environment.json")
    write_report(study.folder, _blocks(entries, config, problem, judge, held_out, pictures, machine))


def _blocks(
    entries: Sequence[Entry],
    config: CompareConfig,
    problem: Problem,
    judge: Judge,
    held_out: HeldOut,
    pictures: Sequence[Block],
    machine: Mapping[str, Any],
) -> list[Block]:
    task = problem.task
    sizes = ", ".join(f"{problem.count(split):,} to {what}" for split, what in SPLITS.items())
    return [
        Heading(f"{len(entries)} ways to tune {config.base} to {task.name}", 1),
        Paragraph(
            f"{task.description or task.name} ({task.kind.replace('_', ' ')}; records: {sizes}). Every method had "
            f"the same base, the same {config.steps} steps of {config.batch_size} records in the same order, and "
            f"{config.rates} learning rates to choose from by {judge.metric} on valid, with a seed of its own; then it "
            f"was trained with its rate and {config.seeds} other seeds, and only those runs were judged on test."
        ),
        table(entries),
        *(Paragraph(why) for why in reasons(entries)),
        Paragraph(_legend(config, judge, held_out)),
        *pictures,
        Heading("Machine"),
        Paragraph(", ".join(f"{key}: {value}" for key, value in machine.items() if value)),
    ]


def _legend(config: CompareConfig, judge: Judge, held_out: HeldOut) -> str:
    forgetting = (
        f"not measured: {held_out.missing}"
        if held_out.missing
        else f"the change of the base's own loss on held-out text ({held_out.before:.3f} nats before) with the method "
        "on and switched off"
    )
    return (
        f"score: mean {judge.metric} on test and its standard deviation over seeds; {LEVEL} %: its bootstrap interval "
        "over seeds and records; less full: that of the difference to full fine-tuning, drawn together. trained: the "
        "values that train, the new head among them. artefact: what a method leaves behind. step: process CPU time, "
        "median. memory: by how much training raised the peak of a process that had loaded the model. inference: CPU "
        f"time of a forward pass as a multiple of the base's, and merged into it. forgets: {forgetting}. energy: an "
        f"estimate, CPU seconds of training times {config.watts:g} W."
    )
