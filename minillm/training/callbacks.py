"""What happens beside the training loop: progress on the screen, evaluations, early stopping."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minillm.training.distributed import from_main, is_main

if TYPE_CHECKING:  # the trainer imports this file
    from minillm.training.trainer import Trainer


class Callback:
    """Override what you need. Every process calls it, at the same steps; only `is_main()` writes and prints."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """After each step; `record` has step, loss, lr, grad_norm, tokens and the loss function's metrics."""

    def on_eval(self, trainer: "Trainer", name: str, values: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_end(self, trainer: "Trainer") -> None:
        """When `fit` ends, in whatever way."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class ProgressBar(Callback):
    """A line on the screen: steps, time left, loss, tokens per second, the last evaluation."""

    def __init__(self, label: str = "training"):
        self.label = label

    def on_start(self, trainer: "Trainer") -> None:
        from tqdm import tqdm

        self.start, self.tokens, self.evaluated = time.perf_counter(), trainer.tokens, ""
        self.bar = tqdm(
            total=trainer.config.steps,
            initial=trainer.step,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            disable=not is_main(),
        )

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        speed = (trainer.tokens - self.tokens) / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed:,.0f} tokens/s{self.evaluated}", refresh=False)
        self.bar.update()

    def on_eval(self, trainer: "Trainer", name: str, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.evaluated = f", {name} loss {values['loss']:.3f}"

    def on_end(self, trainer: "Trainer") -> None:
        self.bar.close()


class Evaluate(Callback):
    """Call `function(model) -> {name: number}` every `config.eval_every` steps and after the last one.

    The model is in eval mode and makes no gradients meanwhile. Under torchrun the main process evaluates and the
    others wait for its numbers, so all take the same decisions.
    """

    def __init__(self, function: Callable[[nn.Module], Mapping[str, float]], name: str = "eval"):
        self.function, self.name = function, name

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if trainer.due(trainer.config.eval_every):
            trainer.report(self.name, from_main(lambda: self._values(trainer.model)))

    @torch.no_grad()
    def _values(self, model: nn.Module) -> dict[str, float]:
        training = model.training
        model.eval()
        try:
            return dict(self.function(model))
        finally:
            model.train(training)


class EarlyStopping(Callback):
    """End the run when `config.patience` evaluations in a row have not lowered the best value seen (0: never).

    Watches `metric` of the evaluation `name`. A value that is not a number counts as no improvement.
    """

    def __init__(self, metric: str = "loss", name: str = "eval"):
        self.metric, self.name = metric, name
        self.best, self.waited = math.inf, 0

    def on_start(self, trainer: "Trainer") -> None:
        self._judge(trainer)  # a run that was resumed after it had stopped stops again

    def on_eval(self, trainer: "Trainer", name: str, values: Mapping[str, float]) -> None:
        if name != self.name:
            return
        if self.metric not in values:
            raise ValueError(f"EarlyStopping watches {self.metric!r}, but {name} gives {', '.join(values)}")
        improved = values[self.metric] < self.best
        self.best, self.waited = (values[self.metric], 0) if improved else (self.best, self.waited + 1)
        self._judge(trainer)

    def _judge(self, trainer: "Trainer") -> None:
        if 0 < trainer.config.patience <= self.waited:
            trainer.stop(f"{self.waited} evaluations without a {self.name} {self.metric} below {self.best:.4f}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
