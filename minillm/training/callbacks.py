"""What happens beside the training loop: progress on the screen, evaluations, early stopping."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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

    def on_finish(self, trainer: "Trainer") -> None:
        """When the last step is done and saved. What changes the weights now changes the result, not the checkpoint."""

    def on_end(self, trainer: "Trainer") -> None:
        """When `fit` ends, in whatever way."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a resumed run must know, by name."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""


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

    Watches `metric` of the evaluation `name`. A value that is not a number counts as no improvement. With a patience,
    the run's result are the weights of the best evaluation: a copy of what trains is kept in main memory and in the
    checkpoints, and takes the last weights' place when `fit` ends (Prechelt 1998, "Early stopping - but when?").
    The checkpoint of the last step holds the last weights too, so a longer run goes on from them.
    """

    def __init__(self, metric: str = "loss", name: str = "eval"):
        self.metric, self.name = metric, name
        self.best, self.best_step, self.waited = math.inf, 0, 0
        self.weights: dict[str, Tensor] = {}  # of best_step

    def on_start(self, trainer: "Trainer") -> None:
        self._judge(trainer)  # a run that was resumed after it had stopped stops again

    def on_eval(self, trainer: "Trainer", name: str, values: Mapping[str, float]) -> None:
        if name != self.name:
            return
        if self.metric not in values:
            raise ValueError(f"EarlyStopping watches {self.metric!r}, but {name} gives {', '.join(values)}")
        if values[self.metric] < self.best:
            self.best, self.best_step, self.waited = values[self.metric], trainer.step, 0
            self.weights = trainer.copy_weights() if trainer.config.patience else {}
        else:
            self.waited += 1
        self._judge(trainer)

    def _judge(self, trainer: "Trainer") -> None:
        if 0 < trainer.config.patience <= self.waited:
            trainer.stop(f"{self.waited} evaluations without a {self.name} {self.metric} below {self.best:.4f}")

    def on_finish(self, trainer: "Trainer") -> None:
        if not trainer.config.patience or self.best_step in (0, trainer.step):
            return
        if not self.weights:
            warnings.warn(
                f"the best {self.name} {self.metric} was {self.best:.4f} at step {self.best_step}, when patience was 0 "
                f"and no weights were kept: the result are those of step {trainer.step}",
                stacklevel=2,
            )
            return
        trainer.put_weights(self.weights, self.best_step)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]

    def tensors(self) -> dict[str, Tensor]:
        return self.weights

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.weights = tensors
