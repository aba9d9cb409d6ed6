"""One run of a study: a method, a learning rate, a seed."""

import hashlib
import math
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from minillm.config import to_dict
from minillm.evaluation import evaluate
from minillm.files import write_json
from minillm.peft import Report, save_adapter, tune, tunings_of
from minillm.recipes.common import folder_bytes
from minillm.recipes.compare.forgetting import HeldOut
from minillm.recipes.compare.judge import Judge
from minillm.recipes.compare.problem import Batches, Problem
from minillm.recipes.compare.rows import Row
from minillm.recipes.locate import note_untied_head
from minillm.training import Callback, Interrupted, RankGrowth, TrainConfig, Trainer

CHOOSING = 0  # the seed with which rates are chosen; the reported seeds are 1, 2, ...


class Unsaved(Trainer):
    """A run so short that it is begun anew rather than resumed: it writes no checkpoint."""

    def save(self) -> None:
        """Nothing."""

    def _interrupt(self, signum: int) -> NoReturn:
        raise Interrupted(signum, f"{signal.Signals(signum).name}: stopped after step {self.step}, which is not kept")


class Hashed(Batches):
    """The same batches, and a hash of all that were given."""

    def __init__(self, problem: Problem, seed: int):
        super().__init__(problem, seed)
        self.digest = hashlib.sha256()

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = super().__next__()
        for name, values in sorted(batch.items()):
            self.digest.update(name.encode() + values.numpy().tobytes())
        return batch


class Watch(Callback):
    """The learning curve on valid, and the CPU time of each step without what it takes to measure."""

    def __init__(self, problem: Problem, points: int):
        self.problem, self.points = problem, points
        self.clock = time.process_time
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []

    def on_start(self, trainer: Trainer) -> None:
        if trainer.device.type != "cpu":
            self.clock = time.perf_counter  # the process waits for the device, which a CPU clock does not see
        self._measure(trainer)
        self.began = self.clock()

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.seconds.append(self.clock() - self.began)
        steps = trainer.config.steps
        if trainer.step * self.points // steps > (trainer.step - 1) * self.points // steps:
            self._measure(trainer)
        self.began = self.clock()

    def _measure(self, trainer: Trainer) -> None:
        batches = self.problem.batches("valid")
        self.curve.append((trainer.step, evaluate(trainer.model, batches, self.problem.loss_fn)["loss"]))


def tuned_model(problem: Problem, row: Row, seed: int) -> tuple[nn.Module, Report]:
    """A fresh base with the method on it; its new values are drawn from `seed`. ValueError if it cannot take it."""
    model = problem.new_model(seed)
    method = problem.method(model, row.config(model, problem.settings.steps))
    limit = problem.base.model.config.max_positions
    if problem.settings.length + method.positions > limit:
        raise ValueError(f"it takes {method.positions} of {limit} positions, and length={problem.settings.length}")
    torch.manual_seed(seed)
    report = tune(model, method)
    note_untied_head(model)
    return model, report


def train_config(problem: Problem, rate: float, seed: int) -> TrainConfig:
    """The same for every method, but for the rate."""
    every = {"log_every": 1, "eval_every": 0, "save_every": 0, "device": problem.settings.device}
    return TrainConfig(problem.settings.steps, rate, weight_decay=0.0, seed=seed, **every)


def run_trial(
    problem: Problem, judge: Judge, row: Row, rate: float, seed: int, folder: Path, held_out: HeldOut | None = None
) -> dict[str, Any]:
    """Train in `folder` and measure: on valid, or with `held_out`, which makes it a reported run, on test."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    model, report = tuned_model(problem, row, seed)
    watch, loader = Watch(problem, problem.settings.points), Hashed(problem, seed)
    growth = [RankGrowth(model)] if any(t.config.callback == "RankGrowth" for t in tunings_of(model).values()) else []
    trainer = Unsaved(model, problem.loss_fn, loader, train_config(problem, rate, seed), folder, [watch, *growth])
    trainer.fit()
    method = next(iter(tunings_of(model).values())).config
    facts: dict[str, Any] = {
        "method": {"name": method.name} | to_dict(method),
        "trainable": report.trainable,
        "total": report.total,
        "data_sha256": loader.digest.hexdigest(),
        "curve": watch.curve,
        "step_cpu_seconds": statistics.median(watch.seconds),
        "train_cpu_seconds": math.fsum(watch.seconds),
    }
    facts |= _scores(problem, judge, model, "test" if held_out else "valid", folder)
    if held_out:
        facts |= {"artefact_bytes": _artefact(problem, model, folder), "forgetting": held_out.changes(model)}
    return facts


def _scores(problem: Problem, judge: Judge, model: nn.Module, split: str, folder: Path) -> dict[str, Any]:
    """The metrics of what the model says to `split`, which is kept."""
    said, right = problem.predict(model, split), problem.references(split)
    groups = problem.groups(split)
    kept = {"split": split, "predictions": said, "references": right, "groups": groups}
    write_json(folder / "predictions.json", kept)
    metrics = judge.measure(said, right, groups)
    if broken := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(f"the score on {split} is not a number: {', '.join(broken)}")
    return {"split": split, "metrics": metrics, "score": metrics[judge.metric]}


def _artefact(problem: Problem, model: nn.Module, folder: Path) -> int:
    """The bytes of what the method leaves behind."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = folder / "adapter" if problem.settings.keep_adapters else Path(temporary) / "adapter"
        save_adapter(model, place, base=problem.settings.base, beside=problem.beside(model))
        return folder_bytes(place)


def reason(error: BaseException) -> str:
    """What is to stand in the table: the first sentence of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return text.split(". ")[0][:200]
