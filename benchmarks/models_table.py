"""The table of model families, from what the parity tests measured.

MINILLM_PARITY=benchmarks/results/parity.json pytest tests/models/families
python benchmarks/models_table.py [file]        # prints the table
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "parity.json"
OBJECTIVES = {
    "lm": "next token",
    "seq2seq": "pairs of texts, span corruption, infilling",
    "masked_lm": "masked tokens and words",
}
HEADS = {
    "classification": "classification",
    "multi_label": "multi-label",
    "regression": "regression",
    "tagging": "token classification",
    "span": "question answering",
    "choice": "multiple choice",
    "embedding": "pooled output",
}


def table(path: Path = RESULTS) -> str:
    """Markdown: each family's checkpoint types, objectives and heads, and its largest relative error of any test."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| family | checkpoint type | objective | heads | float32 | float64 |", "|---|---|---|---|---|---|"]
    for family in dict.fromkeys(result["family"] for result in facts["results"]):
        results = [result for result in facts["results"] if result["family"] == family]
        types = ", ".join(dict.fromkeys(f"`{result['model_type']}`" for result in results))
        tasks = {"seq2seq" if "Conditional" in result["class"] else result["task"] for result in results}
        errors = (f"{_largest(results, dtype):.0e}" for dtype in ("float32", "float64"))
        lines.append(
            f"| {family} | {types} | {_named(OBJECTIVES, tasks)} | {_named(HEADS, tasks)} | {' | '.join(errors)} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commit = facts["environment"]["commit"][:12]
    lines += ["", f"The last two columns: {_EXPLAINED} (commit {commit}, {versions})."]
    return "\n".join(lines)


_EXPLAINED = (
    "the largest difference from transformers, relative to the largest value, of logits or hidden states, of those "
    "computed piece by piece with a cache, and of all parameters' gradients, over tiny random models of every class"
)


def _named(names: dict[str, str], tasks: set[str]) -> str:
    return ", ".join(name for task, name in names.items() if task in tasks) or "-"


def _largest(results: list[dict[str, Any]], dtype: str) -> float:
    return max(error[dtype] for result in results for error in result["errors"].values() if dtype in error)


if __name__ == "__main__":
    print(table(*map(Path, sys.argv[1:])))
