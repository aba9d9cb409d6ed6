"""`minillm compare`: one fair scoreboard of all methods, on one base and one task."""

import hashlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from minillm.config import to_dict
from minillm.data.tasks import Task
from minillm.files import write_json
from minillm.models import weights_fingerprint
from minillm.recipes.common import say
from minillm.recipes.compare import costs, output
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.compare.examples import make_problem
from minillm.recipes.compare.find import find_base, find_task
from minillm.recipes.compare.forgetting import HeldOut
from minillm.recipes.compare.judge import Judge
from minillm.recipes.compare.problem import Problem
from minillm.recipes.compare.results import collect
from minillm.recipes.compare.rows import Row, choose_rows
from minillm.recipes.compare.study import Job, Study
from minillm.recipes.compare.trial import CHOOSING, reason, run_trial, train_config, tuned_model
from minillm.recipes.locate import quote
from minillm.training import Interrupted

FREE = ("run", "methods", "seeds", "keep_adapters", "watts", "folder", "base", "task")  # what two calls may differ in


def compare(config: CompareConfig, task: Task | None = None) -> Path:
    """Compare all rows that the config names; returns the study's folder.

    It holds report.html, table.md, table.csv, results.json, plots/ and all runs (see `study.py`). The same call again,
    in as many processes as you like, also under torchrun, goes on with a study that is not finished. `task`: a task of
    your own, in place of the one that `config.task` names. ValueError for whatever cannot work, before the first run.
    """
    main = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ and not config.run:
        raise ValueError("run: several processes share one folder: name it, run=FOLDER")
    rows = choose_rows(config.methods)
    base, place = find_base(config.base)
    problem = make_problem(base, task or find_task(config), config)
    for split in ("train", "valid"):
        problem.examples(split)  # refuses now what would make every run fail
    judge = Judge(problem.task, config.metric)
    judge.check(problem.perfect("valid"), problem.references("valid"), problem.groups("valid"))
    folder = Path(config.run or time.strftime("runs/compare-%Y%m%d-%H%M%S"))
    study = Study(folder, _identity(config, problem, judge), rows, config.rates, config.seeds)
    model = problem.new_model(CHOOSING)
    for row in rows:
        _describe(study, row, problem, model)
    worker = Worker(study, problem, judge, HeldOut(base, place, config))
    if main:
        say(_introduction(config, problem, judge, study))
    worker.work(main)
    if main:
        draws = output.DRAWS[problem.task.kind == "rewriting"]
        entries = collect(study, judge.score, draws)
        output.write(study, entries, config, problem, judge, worker.held_out)
        say(output.as_text(entries, judge.metric))
        say(f"\nEverything is in {folder}; open {folder / 'report.html'}")
    return folder


class Worker:
    """One process that works at a study: it has loaded the base and the task, and does one job after the other."""

    def __init__(self, study: Study, problem: Problem, judge: Judge, held_out: HeldOut):
        self.study, self.problem, self.judge, self.held_out = study, problem, judge, held_out
        self.rows = {row.name: row for row in study.rows}

    def work(self, show: bool) -> None:
        """Work until the study is done."""
        from tqdm import tqdm

        with tqdm(total=self.study.total(), desc="runs", unit="run", dynamic_ncols=True, disable=not show) as bar:

            def progress(done: int) -> None:
                bar.update(done - bar.n)

            bar.initial = sum(self.study.result(job) is not None for job in self.study.jobs())
            progress(bar.initial)
            try:
                self.study.run(lambda job, folder: self._execute(job, folder, bar.set_postfix_str), progress)
            except (KeyboardInterrupt, Interrupted):
                say(f"\nGo on with the same command and run={quote(self.study.folder)}")
                raise

    def _execute(self, job: Job, folder: Path, show: Callable[[str], None]) -> dict[str, Any]:
        """What the job finds; an error is a finding too, and no other run suffers from it."""
        show(job.name)
        row, settings = self.rows[job.row], self.problem.settings
        try:
            if job.stage == "costs":
                return {"memory_added": costs.memory_added(self.problem, row)} | costs.overhead(self.problem, row)
            held_out = self.held_out if job.stage == "report" else None
            seed = job.seed if job.stage == "report" else CHOOSING
            found = run_trial(self.problem, self.judge, row, job.rate, seed, folder, held_out)
            energy = found["train_cpu_seconds"] * settings.watts
            return {"rate": job.rate, "seed": seed} | found | {"joules": energy}
        except Exception as error:
            where = [line.strip() for line in traceback.format_tb(error.__traceback__)]
            write_json(folder / "error.json", {"type": type(error).__name__, "reason": reason(error), "where": where})
            return {"rate": job.rate, "seed": job.seed, "reason": reason(error)}


def _describe(study: Study, row: Row, problem: Problem, model: nn.Module) -> None:
    """Write down what the row is, and whether the base can take it."""

    def flaw() -> str:
        try:
            tuned_model(problem, row, CHOOSING)
        except ValueError as error:
            return reason(error)
        return ""

    settings = problem.settings
    method = row.config(model, settings.steps)
    described = {"title": row.title, "family": row.family, "rates": list(row.rates[: settings.rates])}
    study.describe_row(row, described | {"method": {"name": method.name} | to_dict(method)}, flaw)


def _identity(config: CompareConfig, problem: Problem, judge: Judge) -> dict[str, Any]:
    """What must be the same for runs to be comparable."""
    task, settings = problem.task, to_dict(config)
    content = hashlib.sha256(repr([task.kind, task.labels, *sorted(task.splits.items())]).encode()).hexdigest()
    return {
        "base": weights_fingerprint(problem.base.model),
        "tokenizer": problem.tokenizer.fingerprint,
        "task": task.name,
        "task_sha256": content,
        "metrics": list(judge.names),
        "chosen_with_seed": CHOOSING,
        "training": to_dict(train_config(problem, 1.0, 0)),
        **{f"config.{name}": value for name, value in settings.items() if name not in FREE},
    }


def _introduction(config: CompareConfig, problem: Problem, judge: Judge, study: Study) -> str:
    sizes = ", ".join(f"{problem.count(split):,} to {what}" for split, what in output.SPLITS.items())
    return (
        f"{len(study.rows)} methods on {config.base} and {problem.task.name} ({sizes}), judged by {judge.metric}: "
        f"rates to try: {config.rates}, seeds: {config.seeds}, steps: {config.steps}, at most {study.total()} runs"
    )
