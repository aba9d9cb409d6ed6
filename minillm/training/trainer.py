"""The training loop. It knows a loss function and callbacks; of models that they have parameters, and may be tuned."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from minillm.peft import tunings_of
from minillm.training import checkpoint, state
from minillm.training.callbacks import Callback
from minillm.training.config import TrainConfig
from minillm.training.distributed import from_main, is_main, pick_device, world
from minillm.training.gradients import Gradients, StepResult
from minillm.training.losses import Loss
from minillm.training.optimizer import make_optimizer
from minillm.training.randomness import random_state, seed_everything, set_random_state
from minillm.training.run_folder import Records, Timing, refuse_a_used_folder
from minillm.training.schedule import lr_at
from minillm.training.signals import Interrupted, catch_signals

Batch = Mapping[str, Tensor]


class Trainer:
    """Minimise `loss_fn(model, batch)` over the batches of `loader`, writing what happens to `run_dir`.

    loader: an endless iterator over dicts of tensors, with state_dict() and load_state_dict().
    identity: plain values that must be the same when the run is resumed, such as the tokenizer's fingerprint.
    The model is moved to `config.device`. `metrics.jsonl` gets what is reproducible, so that a resumed run's file is
    byte for byte an uninterrupted one's; `timing.jsonl` gets the rest.

    Example: `Trainer(model, causal_lm_loss, loader, TrainConfig(steps=500), "runs/mine", [ProgressBar()]).fit()`
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Batch], Loss],
        loader: Iterator[Batch],
        config: TrainConfig,
        run_dir: str | Path,
        callbacks: Iterable[Callback] = (),
        identity: Mapping[str, Any] | None = None,
    ):
        _check_loader(loader)
        self.config, self.run_dir, self.loader = config, Path(run_dir), loader
        self.callbacks, self.identity = tuple(callbacks), json.loads(json.dumps(identity or {}))  # as it will be saved
        _check_callbacks(model, self.callbacks)
        self.device = pick_device(config.device)
        self.model = model.to(self.device)
        if config.gradient_checkpointing:
            _switch_on_gradient_checkpointing(model)
        self.optimizer = make_optimizer(model, config)
        self.gradients = Gradients(model, loss_fn, self.device, config)
        self.metrics, self.timing = Records(self.run_dir / "metrics.jsonl"), Timing(self.run_dir / "timing.jsonl")
        self.step, self.tokens = 0, 0  # optimizer steps done; tokens (whatever Loss.weight counts) in them
        self.record: dict[str, Any] = {}  # of the last step
        self.stopped = ""  # why a callback ended the run
        self.weights_step = 0  # the step whose weights the model holds: not the last one after early stopping
        self.saved_step: int | None = None
        self._resumed = False

    def fit(self) -> dict[str, Any]:
        """Train to `config.steps` or until a callback stops, save, return the last step's record ({}: none was left).

        SIGINT and SIGTERM finish the step (of several processes the next one, in which all hear of it), save and raise
        Interrupted. A loss or gradient that is not finite raises ValueError, with the state before that step saved.
        With a patience the model holds the best evaluated weights in the end (see EarlyStopping).
        """
        if self.step == 0 and not self._resumed:
            refuse_a_used_folder(self.run_dir, ("metrics.jsonl", "checkpoints"))
        if self.saved_step is None:
            seed_everything(self.config.seed + world().rank)  # each process drops out other units
        training = self.model.training
        self.model.train()
        self._call("on_start")
        try:
            with catch_signals() as caught:
                while self.step < self.config.steps and not self.stopped:
                    last = self._train_step(stop=bool(caught.signum))
                    self._after_step()
                    if last or (caught.signum and world().size == 1):  # several processes must agree, a step later
                        self._interrupt(caught.signum or signal.SIGTERM)
                self.save()
                if caught.signum:  # it came too late for a step to notice
                    self._interrupt(caught.signum)
            self.weights_step = self.step
            self._call("on_finish")
        finally:
            self._call("on_end")
            self.model.train(training)
        return self.record

    def resume(self, step: int | None = None) -> int:
        """Go back to the newest checkpoint, or that of `step`, and return its step; 0 if there is none yet.

        What the run wrote after it, checkpoints and records, is deleted: `fit` will write it again. Raises ValueError
        if the checkpoint is damaged (naming the one before it), if records or checkpoints are missing, or lists all in
        which the run has changed.
        """
        saved = checkpoint.load_checkpoint(self.run_dir, step)
        state.check_records(self, saved)
        if saved is not None:
            state.put_back(self, saved)
            self.saved_step = self.step
        from_main(lambda: self._forget_after(-1 if saved is None else self.step))
        self._resumed = True
        return self.step

    def _forget_after(self, step: int) -> None:
        # Checkpoints first: should this stop half-way, the newest checkpoint still has all its records.
        later = [other for other in checkpoint.list_checkpoints(self.run_dir) if other > step]
        checkpoint.delete_checkpoints(self.run_dir, later)
        for records in (self.metrics, self.timing):
            records.cut(step)

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it is there already."""
        if self.saved_step != self.step:
            moment = state.take(self)
            from_main(lambda: checkpoint.save_checkpoint(self.run_dir, moment, self.config.keep_checkpoints))
            self.saved_step = self.step

    def report(self, name: str, values: Mapping[str, float]) -> None:
        """Record an evaluation and tell the callbacks."""
        if is_main():
            self.metrics.write({"step": self.step, name: dict(values)})
        self._call("on_eval", name, values)

    def copy_weights(self) -> dict[str, Tensor]:
        """A copy in main memory of what trains, and of the saved buffers."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.saved_tensors(self.model).items()}

    def put_weights(self, weights: dict[str, Tensor], step: int) -> None:
        """Let the model hold the weights that `copy_weights` gave at `step`."""
        state.put_tensors(self.model, weights)
        self.weights_step = step

    def stop(self, reason: str) -> None:
        """End the run when this step is over."""
        self.stopped = reason

    def due(self, every: int) -> bool:
        """Whether what happens `every` so many steps, and after the last one, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _train_step(self, stop: bool) -> bool:
        """One optimizer step. Returns whether a signal, in this process or another, wants it to be the last."""
        start, before = time.perf_counter(), (random_state(self.device), self.loader.state_dict())
        lr = lr_at(self.step + 1, self.config)
        self.optimizer.zero_grad()
        found = self.gradients.compute(islice(self.loader, self.config.accumulate), stop)
        if not self.optimizer.state:
            _check_all_reached(self.model)
        if not (math.isfinite(found.loss) and math.isfinite(found.norm)):
            self._give_up(found, lr, *before)
        self.gradients.scale_and_clip(found)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step, self.tokens = self.step + 1, self.tokens + found.weight
        self.record = {"step": self.step, "loss": found.loss, "lr": lr, "grad_norm": found.norm, "tokens": self.tokens}
        self.record |= found.metrics
        self.timing.add(time.perf_counter() - start, found.weight)
        return found.stop

    def _after_step(self) -> None:
        if self.due(self.config.log_every) and is_main():
            self.metrics.write(self.record)
            self.timing.write_since_last(self.step, self.device)
        self._call("on_step", self.record)
        if self.due(self.config.save_every):  # last, so that a checkpoint's records are all there before it is
            self.save()

    def _interrupt(self, signum: int) -> NoReturn:
        self.save()
        folder = checkpoint.path_of(self.run_dir, self.step)
        message = f"{signal.Signals(signum).name}: stopped after step {self.step}, saved in {folder}; resume to go on"
        if is_main():
            print(f"\n{message}", file=sys.stderr)
        raise Interrupted(signum, message)

    def _give_up(self, found: StepResult, lr: float, random: dict[str, Any], loader: dict[str, Any]) -> NoReturn:
        """Save the state before this step (it has changed running statistics only) and say what happened."""
        loss, norm, weight = found.loss, found.norm, found.weight
        set_random_state(random, self.device)
        self.loader.load_state_dict(loader)
        self.save()
        if math.isnan(weight):
            raise ValueError(
                f"step {self.step + 1}: no label in the whole step counts (all are -100): look at how the data marks "
                f"its labels. The state of step {self.step} is saved in {checkpoint.path_of(self.run_dir, self.step)}"
            )
        raise ValueError(
            f"step {self.step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite "
            f"(loss {loss}, gradient norm {norm}, learning rate {lr:.3g}). The weights are still those of step "
            f"{self.step}, saved in {checkpoint.path_of(self.run_dir, self.step)}; resuming repeats this step. Likely "
            "causes: a learning rate too high or a warm-up too short (look at grad_norm in metrics.jsonl), no clipping "
            "(clip=0), a batch with broken values, a mask that hides every key of some query"
        )

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


def _check_callbacks(model: nn.Module, callbacks: Iterable[Callback]) -> None:
    """Refuse to train a tuning method without the callback that it lives by."""
    there = {type(callback).__name__ for callback in callbacks}
    for name, tuning in tunings_of(model).items():
        needed = tuning.config.callback
        if tuning.trains and needed and needed not in there:
            raise ValueError(
                f"the adapter {name!r} is trained by {tuning.config.name}, which needs a callback beside it: "
                f"Trainer(..., callbacks=[{needed}(model, {name!r})])  # from minillm.training import {needed}"
            )


def _check_loader(loader: object) -> None:
    needed = ("__next__", "state_dict", "load_state_dict")
    if missing := [name for name in needed if not callable(getattr(loader, name, None))]:
        raise ValueError(
            f"the loader, of type {type(loader).__name__}, has no {', no '.join(missing)}: a loader is an endless "
            "iterator over batches, dicts of tensors, whose state_dict() says where it stands and whose "
            "load_state_dict(state) goes there, so that a stopped run can go on; minillm.data has some"
        )


def _check_all_reached(model: nn.Module) -> None:
    """A parameter without a gradient is never trained, and DDP waits for it for ever."""
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
        raise ValueError(
            f"{len(missing)} trainable parameters get no gradient from the loss: {', '.join(missing[:10])}"
            + (", ..." if len(missing) > 10 else "")
            + "; freeze them with requires_grad_(False), or look where the loss function leaves them out"
        )


def _switch_on_gradient_checkpointing(model: nn.Module) -> None:
    if not isinstance(getattr(model, "gradient_checkpointing", None), bool):
        raise ValueError(
            f"gradient_checkpointing=true, but {type(model).__name__} has no attribute of that name to switch on: "
            "choose false, or let the model's forward read one"
        )
    model.gradient_checkpointing = True
