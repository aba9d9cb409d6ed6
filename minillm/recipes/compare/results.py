"""What a study found, from its files alone: one entry for each row, in the order of the table."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from minillm.evaluation import over_seeds
from minillm.files import read_json
from minillm.recipes.compare.intervals import DRAWS, draw_scores, interval
from minillm.recipes.compare.study import Job, Study

REFERENCE = "full"  # the row that others are compared with, where it is there


def collect(study: Study, score: Callable[..., float], draws: int = DRAWS) -> list[dict[str, Any]]:
    """An entry for each row; `score` judges predictions by references.

    Where something is not known there is no key, and `reason` says why.
    """
    entries = [_entry(study, row.name) for row in study.rows]
    drawn = {e["row"]: draw_scores(score, *_said(study, e), draws=draws) for e in entries if "score" in e}
    for entry in entries:
        if (name := entry["row"]) in drawn:
            entry["interval"] = interval(drawn[name])
            if REFERENCE in drawn and name != REFERENCE:
                entry["to_full"] = interval(drawn[name] - drawn[REFERENCE])
    return entries


def _said(study: Study, entry: dict[str, Any]) -> tuple[list[list[Any]], list[Any], list[str] | None]:
    """The predictions of each seed for test, the references, and the groups that they are judged in."""
    folder = study.folder / "rows"
    files = [folder / Job(entry["row"], "report", seed=seed).name / "predictions.json" for seed in entry["seeds"]]
    kept = [read_json(file) for file in files]
    return [each["predictions"] for each in kept], kept[0]["references"], kept[0]["groups"]


def _entry(study: Study, name: str) -> dict[str, Any]:
    described = read_json(study.folder / "rows" / name / "row.json")
    entry = {"row": name, "title": described["title"], "family": described["family"]}
    if "reason" in described:
        return entry | {"status": "cannot", "reason": described["reason"]}
    rate = study.chosen_rate(name)
    if rate is None:
        failed = [study.result(Job(name, "choose", rate)) for rate in described["rates"]]
        why = "; ".join(dict.fromkeys(result["reason"] for result in failed if result))
        return entry | {"status": "failed", "reason": f"every rate failed: {why}"}
    runs = [study.result(Job(name, "report", rate, seed)) for seed in range(1, study.seeds + 1)]
    done, costs = [run for run in runs if run and "score" in run], study.result(Job(name, "costs")) or {}
    entry |= {"status": "done" if done else "failed", "rate": rate, "seeds": [run["seed"] for run in done]}
    if failed := [run for run in runs if run and "reason" in run]:
        entry["reason"] = f"{len(failed)} of {len(runs)} seeds failed: {failed[0]['reason']}"
    elif "reason" in costs:
        entry["reason"] = f"costs: {costs['reason']}"
    if done:
        entry |= _means(done)
    return entry | {key: costs[key] for key in ("memory_added", "unmerged", "merged") if costs.get(key) is not None}


def _means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds of one row."""
    values = [run["score"] for run in runs]
    spread = over_seeds(values)
    means = {"score": spread.mean, "std": spread.std if len(runs) > 1 else None, "scores": values, "metrics": {}}
    for name in runs[0]["metrics"]:
        means["metrics"][name] = statistics.fmean(run["metrics"][name] for run in runs)
    for key in ("trainable", "total", "artefact_bytes"):
        means[key] = runs[0][key]
    means["share"] = means["trainable"] / means["total"]
    means["step_cpu_seconds"] = statistics.median(run["step_cpu_seconds"] for run in runs)
    means["joules"] = statistics.fmean(run["joules"] for run in runs)
    for side in ("on", "off"):
        if all(run["forgetting"][side] is not None for run in runs):
            means[f"forgetting_{side}"] = statistics.fmean(run["forgetting"][side] for run in runs)
    means["curves"] = [run["curve"] for run in runs]
    return means
