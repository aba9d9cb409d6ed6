"""The gradient of one step: of the mean over all tokens of all its batches in all processes.

Batches count unequally many tokens, so the mean of their means is not the mean. With w_i the weight of batch i and W
the sum of all, the step's gradient is sum_i (w_i / W) grad_i. W is known only after the last batch; so each batch is
scaled as if all were like the first, and what that was wrong by is one factor at the end, exactly 1 when it was right.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.peft import auxiliary_loss
from minillm.training.config import TrainConfig
from minillm.training.distributed import sum_over_processes, world
from minillm.training.losses import Loss


class StepResult(NamedTuple):
    """What a step's backward passes found; `.grad` times `scale` is the gradient, and `norm` the norm of that."""

    loss: float
    norm: float
    scale: float
    weight: int | float
    metrics: dict[str, float]
    stop: bool  # some process wants to stop after this step


class LossModule(nn.Module):
    """A model whose output is its loss: so DDP and compile work on the loss, whatever it calls of the model.

    What a tuning method adds to the loss, such as a balance of experts, is added to every loss function's, so that no
    loss function can forget it; the log has it as `penalty`.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Mapping[str, Tensor]], Loss]):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Mapping[str, Tensor]) -> Loss:
        loss = self.loss_fn(self.model, batch)
        penalty = auxiliary_loss(self.model, batch.get("mask"))
        if penalty is None or not isinstance(loss, Loss):
            return loss
        return Loss(loss.value + penalty, loss.weight, {**loss.metrics, "penalty": penalty.detach()})


class Gradients:
    """Computes a step's gradients of `loss_fn(model, batch)`, compiled or not, in one process or several."""

    def __init__(self, model: nn.Module, loss_fn: Callable, device: torch.device, config: TrainConfig):
        self.device, self.config = device, config
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.module: nn.Module = LossModule(model, loss_fn)
        if config.compile:
            self.module.compile()
        if world().size > 1:
            self.module = DistributedDataParallel(self.module)

    def compute(self, batches: Iterable[Mapping[str, Tensor]], stop: bool) -> StepResult:
        """Run `config.accumulate` batches forward and backward; the loop itself waits for the device once, at the end.

        All processes get the same numbers. A loss or norm that is not finite is returned like any other.
        """
        expected, sums, names, count = None, 0.0, [], 0
        for count, batch in enumerate(batches, 1):
            with self._averaging(count == self.config.accumulate):
                loss, names, means = self._forward(batch)
                weight = torch.as_tensor(loss.weight, dtype=torch.float64, device=self.device)
                if expected is None:
                    expected = sum_over_processes(weight.clone()) * self.config.accumulate
                    expected = torch.where(expected > 0, expected, 1.0)
                (loss.value * (weight * world().size / expected)).backward()  # times size: DDP divides by it
                sums = sums + weight * means
        if count < (needed := self.config.accumulate):
            raise ValueError(f"the loader ended after {count} of a step's {needed} batches: it must be endless")
        sums = sum_over_processes(torch.cat([sums, sums.new_tensor([float(stop)])]))
        scale = expected / sums[0]
        norm = torch.nn.utils.get_total_norm(self._gradients()) * scale
        total, loss_sum, *metrics, stops, scale, norm = torch.cat([sums, scale[None], norm.double()[None]]).tolist()
        total = total or math.nan  # no label counts: nothing is known of the loss
        metrics = {name: value / total for name, value in zip(names, metrics, strict=True)}
        weight = int(total) if total.is_integer() else total  # nan is no integer
        return StepResult(loss_sum / total, norm, scale, weight, metrics, stops > 0)

    def scale_and_clip(self, result: StepResult) -> None:
        """Make `.grad` the gradient, shrunk to norm `clip` if it is longer; no pass over memory if nothing changes.

        Source: Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1; the 1e-6 is torch's clip_grad_norm_'s.
        """
        clip = self.config.clip
        scale = result.scale * (min(1.0, clip / (result.norm + 1e-6)) if clip else 1.0)
        if scale != 1.0:
            torch._foreach_mul_(self._gradients(), scale)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager:
        """DDP averages over the processes in a step's last backward pass only."""
        wait = isinstance(self.module, DistributedDataParallel) and not last
        return self.module.no_sync() if wait else contextlib.nullcontext()

    def _forward(self, batch: Mapping[str, Tensor]) -> tuple[Loss, list[str], Tensor]:
        """The loss, its metrics' names, and in float64: 1, the loss, the metrics."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss = self.module(batch)
        _check(loss)
        if not loss.value.requires_grad:
            raise ValueError("the loss depends on no trainable parameter: does the loss function detach it?")
        names = sorted(loss.metrics)
        means = [1.0, loss.value, *(loss.metrics[name] for name in names)]
        means = [torch.as_tensor(mean, dtype=torch.float64, device=self.device).detach() for mean in means]
        return loss, names, torch.stack(means)


def _check(loss: object) -> None:
    """ValueError unless a loss function returned what it should."""
    value = loss.value if isinstance(loss, Loss) else loss
    if isinstance(loss, Loss) and isinstance(value, Tensor) and value.numel() == 1:
        return
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    returned = f"{'Loss of a ' * isinstance(loss, Loss)}{type(value).__name__}{shape}"
    raise ValueError(
        f"the loss function returned a {returned}, and a Loss of a scalar is needed. Write: return Loss(value, weight) "
        "with the mean as value and as weight the number of tokens or examples that it is a mean over (from "
        "minillm.training import Loss)"
    )
