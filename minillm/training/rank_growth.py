"""Letting the ranks of an IncreLoRA grow while a trainer trains it."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from minillm.peft.increlora_allocator import RankAllocator
from minillm.training.callbacks import Callback
from minillm.training.distributed import sum_over_processes
from minillm.training.schedule import lr_at

if TYPE_CHECKING:
    from minillm.training.trainer import Trainer


class RankGrowth(Callback):
    """Gives the layers of a model tuned with IncreLoraConfig further ranks (see minillm.peft.increlora_allocator).

    The steps are the trainer's, and a new component's warm-up is as long as the run's. `metrics.jsonl` gets the ranks
    of all layers whenever some have grown. A resumed run grows on exactly as it would have.
    `name` says which adapter, where the model has several.

    Example: `tune(model, IncreLoraConfig()); Trainer(..., callbacks=[RankGrowth(model)]).fit()`
    """

    def __init__(self, model: nn.Module, name: str | None = None):
        self.allocator = RankAllocator(model, name)

    def on_start(self, trainer: "Trainer") -> None:
        config = trainer.config
        if config.compile:
            raise ValueError(
                "compile=true, but growing ranks look at gradients inside the backward pass, which a compiled one does "
                "not show: train with compile=false"
            )
        self.allocator.attach(
            trainer.optimizer,
            steps=config.steps,
            warmup=round(config.warmup_ratio * config.steps),
            share=lambda step: lr_at(step, config) / config.lr,
            reduce=sum_over_processes,
        )

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if self.allocator.grew():
            trainer.report("ranks", self.allocator.ranks)

    def on_finish(self, trainer: "Trainer") -> None:
        if not self.allocator.complete:
            given, budget = sum(self.allocator.ranks.values()), self.allocator.budget
            warnings.warn(f"the ranks grew to {given} together, not to the budget of {budget}", stacklevel=2)

    def on_end(self, trainer: "Trainer") -> None:
        self.allocator.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.allocator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.allocator.load_state_dict(state)
