"""The README's tables and pictures, from the recorded results.

    python benchmarks/table.py            # write them into README.md
    python benchmarks/table.py --check    # exit with 1 if README.md says something else

The results are those of `python benchmarks/run.py`, for the demo those of `python benchmarks/demo.py`, for the model
families those of the parity tests (see models_table.py), for the methods their formulas; the reason for a missed goal
is the `note` of that Goal.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from models_table import table as families

# each a module here and a file in results/
NAMES = (
    *("training_step", "head_loss", "lora_linear", "bert_tiny", "mixed_batch", "quantize"),
    *("decode", "recurrent", "memory_estimate", "import_time"),
)
# the same, of our native kernels
NATIVE = ("native_attention", "native_linear", "native_decode")
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def speed(names: tuple[str, ...] = NAMES) -> str:
    """Markdown: goal, measured value, and whether it is met, or why it is not."""
    results = [json.loads((RESULTS / f"cpu-{name}.json").read_text(encoding="utf-8")) for name in names]
    lines = ["| | goal | measured | |", "|---|---|---|---|"]
    for goal in (goal for result in results for goal in result["goals"]):
        verdict = "met" if goal["met"] else f"**missed**: {goal['note'] or 'no reason known yet'}"
        sign, limit = goal["goal"].split()
        sign = {"<=": "≤", ">=": "≥"}[sign]
        lines.append(f"| {goal['what']} | {sign} {limit} | {goal['measured']:.2f} | {verdict} |")
    return "\n".join([*lines, "", _where(results)])


def _where(results: list[dict[str, Any]]) -> str:
    """One sentence on the machine, the versions and the commits; several of a kind are all named."""

    def each(*values: str) -> str:
        return ", ".join(dict.fromkeys(values))

    machine = each(*(f"{r['machine']['cpu']} ({r['machine']['cores']} cores)" for r in results))
    versions = each(*(f"{name} {version}" for r in results for name, version in r["versions"].items()))
    commits, days = each(*(r["commit"] for r in results)), each(*(r["date"][:10] for r in results))
    return f"Measured on {days} at commit {commits}, on one thread of {machine}, with {versions}."


def demo() -> str:
    """The demo's table and its pictures."""
    from minillm.recipes.demo_plots import picture
    from minillm.recipes.demo_report import table
    from minillm.recipes.report import to_markdown

    facts, where = (
        json.loads((RESULTS / "demo" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("report", "environment")
    )
    folder = (RESULTS / "demo").relative_to(README.parent).as_posix()
    pictures = [to_markdown(picture(name, facts, folder)) for name in ("trade_off", "loss", "attention", "next_token")]
    lines = (
        f"Recorded by `python benchmarks/demo.py` at commit {where['commit'][:12]} with Python {where['python']} and "
        f"torch {where['torch']}: {facts['seconds']:.0f} s on {where['cpus']} cores, at most "
        f"{facts['peak_memory'] / 1e6:.0f} MB in one process. Losses are nats per token on held-out documents; gap "
        "closed is the share of full fine-tuning's gain on source code; memory is that of the method's process, and "
        "how far that lies above the same process with the model loaded."
    )
    return "\n\n".join([to_markdown(table(facts)), lines, *pictures])


def methods() -> str:
    """Markdown: every method of tuning and what it trains in two well-known models, by its formula."""
    from minillm.recipes.methods import describe

    columns = {name: describe(name) for name in ("gpt2", "bert-base")}
    lines = ["| method | | trains in GPT-2 | in BERT-base | merges | peft reads | |", "|---|---|---|---|---|---|---|"]
    for facts, others in zip(*columns.values(), strict=True):
        merges = "yes" if facts.merges else "no"
        counts = f"{facts.count} | {others.count}"
        lines.append(f"| `{facts.name}` | {facts.title} | {counts} | {merges} | {facts.hub_type} | {facts.paper} |")
    return "\n".join([*lines, "", "Values with default settings, by formula; of 124,439,808 and 108,891,648."])


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "methods": methods,
    "families": families,
    "speed": speed,
    "kernels": partial(speed, NATIVE),
}


def main() -> int:
    text = fresh = README.read_text(encoding="utf-8")
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = fresh.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            print(f"README.md has no lines {begin} and {end} to put the {name} section between", file=sys.stderr)
            return 1
        try:
            fresh = f"{before}{begin}\n{make()}\n{end}{after}"
        except FileNotFoundError as error:
            print(f"{error.filename} is missing: see the head of {Path(__file__).name}", file=sys.stderr)
            return 1
    if sys.argv[1:] == ["--check"]:
        if fresh != text:
            print("README.md does not show the recorded results: python benchmarks/table.py", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
