"""The folder of a study: which runs there are to be, which are done, and who does which.

study.json                  what must be the same for all runs of the study
rows/NAME/row.json          the method and its rates, or why the base cannot take it
rows/NAME/choose-RATE/      a run that chooses the rate: metrics.jsonl, predictions.json (valid), result.json
rows/NAME/seed-SEED/        a reported run: the same, with the predictions for test
rows/NAME/costs/            result.json with memory and time
locks/                      a file for each run, held by the process that does it
A result.json is written whole, last, and never again: what has one is done, also if it says why it failed. What has
none is begun anew; so deleting a run's folder lets it be tried again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.files import read_json, write_json
from minillm.recipes.compare.claims import claim
from minillm.recipes.compare.rows import Row
from minillm.training.run_folder import environment, refuse_a_used_folder

FORMAT = 1  # of the folder; raise it when a reader of the old layout would misunderstand the new one
WAIT = 0.2  # seconds until a process that found all work taken looks again
RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """A run to be done once, by whichever process comes first."""

    row: str
    stage: Literal["choose", "report", "costs"]
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder's path below rows/."""
        part = {"choose": f"choose-{self.rate:g}", "report": f"seed-{self.seed}", "costs": "costs"}[self.stage]
        return f"{self.row}/{part}"


class Study:
    """A study in `folder`; opening it checks that it is this one."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rows: Sequence[Row], rates: int, seeds: int):
        self.folder, self.rows, self.rates, self.seeds = folder, rows, rates, seeds
        identity = {"format": FORMAT, **identity}
        if not (folder / "study.json").exists():
            refuse_a_used_folder(folder)  # that of another recipe's run
        with claim(folder / "locks" / "study", wait=True):
            if not (folder / "study.json").exists():
                write_json(folder / "environment.json", environment())
                write_json(folder / "study.json", identity)
        saved = read_json(folder / "study.json")
        _refuse(folder, "study", saved if isinstance(saved, dict) else {}, identity)

    def describe_row(self, row: Row, described: Mapping[str, Any], flaw: Callable[[], str]) -> None:
        """Write what a row is, and by `flaw` why the base cannot take it; or compare it with what was written."""
        path = self.folder / "rows" / row.name / "row.json"
        with claim(self.folder / "locks" / f"{row.name}-row", wait=True):
            if not path.exists():
                why = flaw()
                write_json(path, {**described, **({"reason": why} if why else {})})
        saved = read_json(path)
        saved.pop("reason", None)
        _refuse(self.folder, f"row {row.name!r}", saved, described)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job found, None if it is not done."""
        path = self.folder / "rows" / job.name / RESULT
        return read_json(path) if path.exists() else None

    def chosen_rate(self, row: str) -> float | None:
        """The rate with the best score on valid; None if it is not yet known, or every rate failed.

        Of rates that score alike the likelier one, which stands first.
        """
        described = read_json(self.folder / "rows" / row / "row.json")
        if len(rates := described["rates"]) == 1:
            return rates[0]
        found = [self.result(Job(row, "choose", rate)) for rate in rates]
        if any(result is None for result in found):
            return None
        best = [(r["score"], -i, rate) for i, (r, rate) in enumerate(zip(found, rates, strict=True)) if "score" in r]
        return max(best)[2] if best else None

    def jobs(self) -> list[Job]:
        """All jobs that are known by now: the reported runs of a row only when its rate has been chosen."""
        found = []
        for row in self.rows:
            described = read_json(self.folder / "rows" / row.name / "row.json")
            if "reason" in described:
                continue
            if len(described["rates"]) > 1:
                found += [Job(row.name, "choose", rate) for rate in described["rates"]]
            if rate := self.chosen_rate(row.name):
                found += [Job(row.name, "report", rate, seed) for seed in range(1, self.seeds + 1)]
            found.append(Job(row.name, "costs"))
        return found

    def total(self) -> int:
        """How many jobs there will be at most."""
        able = [row for row in self.rows if "reason" not in read_json(self.folder / "rows" / row.name / "row.json")]
        return len(able) * (self.seeds + 1 + (self.rates if self.rates > 1 else 0))

    def run(self, execute: Callable[[Job, Path], dict[str, Any]], progress: Callable[[int], None]) -> None:
        """Do what is to be done and nobody else does, until all is done; `progress` hears how many jobs are."""
        while pending := [job for job in self.jobs() if self.result(job) is None]:
            progress(sum(self.result(job) is not None for job in self.jobs()))
            if not any(self._attempt(job, execute) for job in pending):
                time.sleep(WAIT)
        progress(len(self.jobs()))

    def _attempt(self, job: Job, execute: Callable[[Job, Path], dict[str, Any]]) -> bool:
        """Do the job unless another process does it or has done it."""
        with claim(self.folder / "locks" / job.name.replace("/", "-")) as mine:
            if not mine or self.result(job) is not None:
                return False
            folder = self.folder / "rows" / job.name
            write_json(folder / RESULT, {"row": job.row, "stage": job.stage} | execute(job, folder))
            return True


def _refuse(folder: Path, what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if differing:
        lines = [f"{key}: {now.get(key)!r} now, {saved.get(key)!r} then" for key in differing]
        raise ValueError(
            f"{folder} holds another {what}, and its runs could not be compared with these:\n  " + "\n  ".join(lines)
            + "\nMake it the same again, or choose another folder (more methods and more seeds may be asked for)"
        )  # fmt: skip
