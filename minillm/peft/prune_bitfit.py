"""Pruned BitFit: which biases are worth training? Score all, keep the best, train these again from the start.

Source: Lawton et al. 2023 (arXiv:2305.16597): structured (whole bias vectors) and unstructured (single entries). The
paper prunes other adapters too; biases of middle layers were what it kept.

    tune(model, BitFitConfig())
    scores = BiasScores(model)
    ...                                   # train; after each backward: scores.update()
    kept = scores.keep_vectors(0.25)      # or scores.keep_entries(1000)
    unload(model)                         # every bias has its pretrained value again
    tune(model, kept)                     # and the kept ones train
"""

import dataclasses

import torch
from torch import Tensor, nn

from minillm.peft.bitfit import BitFitConfig, is_bias
from minillm.peft.method import refuse
from minillm.peft.names import inside
from minillm.peft.record import choose
from minillm.peft.sparse_bias import PrunedBitFitConfig


class BiasScores:
    """How much the loss would change if a trained bias had its pretrained value again, to first order.

    The change of the loss when the update d of an entry is taken back is -d dL/db; the sum over the entries of a vector
    is that of the vector. Both are summed over the steps before their size is taken, so that what goes up in one batch
    and down in another counts for little. Modules that train in full are not scored.
    """

    def __init__(self, model: nn.Module, name: str | None = None):
        tuning = choose(model, name, "score")
        if not isinstance(tuning.config, BitFitConfig):
            raise ValueError(f"{tuning.name!r} is {tuning.config.name}: only the biases of BitFit can be scored")
        self._config = tuning.config
        slots = [slot for slot in tuning.slots if is_bias(slot.name) and not inside(slot.name, tuning.plan.whole)]
        if not slots:
            raise ValueError("there is no bias to score: all that trains is in `trainable`")
        self._slots = {slot.name: slot for slot in slots}
        self._sums = {name: torch.zeros_like(_wide(slot.own)) for name, slot in self._slots.items()}
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add one step's estimate; call it after backward, while the gradients are there."""
        lost = [name for name, slot in self._slots.items() if slot.own.grad is None]
        refuse(lost, "no gradient: call update() after backward and before zero_grad(); without one are:")
        for name, slot in self._slots.items():
            before = 0.0 if slot.before is None else _wide(slot.before)
            self._sums[name] -= (_wide(slot.own) - before) * slot.own.grad
        self._steps += 1

    @property
    def entries(self) -> dict[str, Tensor]:
        """The size of the estimate for each entry of each bias."""
        return {name: total.abs() for name, total in self._sums.items()}

    @property
    def vectors(self) -> dict[str, float]:
        """The size of the estimate for each whole bias."""
        return {name: total.sum().abs().item() for name, total in self._sums.items()}

    def keep_vectors(self, keep: int | float) -> BitFitConfig:
        """The config that trains the best biases only: so many of them, or this fraction."""
        scores = self.vectors
        best = self._best(torch.tensor(list(scores.values()), dtype=torch.float64), keep)
        return dataclasses.replace(self._config, biases=tuple(list(scores)[i] for i in best))

    def keep_entries(self, keep: int | float) -> PrunedBitFitConfig:
        """The config that trains the best entries only: so many of all biases together, or this fraction."""
        best = self._best(torch.cat(list(self.entries.values())), keep)
        kept, start = [], 0
        for name, total in self._sums.items():
            places = tuple(i - start for i in best if start <= i < start + len(total))
            kept += [(name, places)] if places else []
            start += len(total)
        return PrunedBitFitConfig(tuple(kept), trainable=self._config.trainable)

    def _best(self, scores: Tensor, keep: int | float) -> list[int]:
        """The places of the highest scores, in order; among equal ones the first."""
        total = len(scores)
        fraction = type(keep) is float and 0 < keep <= 1
        if not fraction and not (type(keep) is int and 1 <= keep <= total):
            raise ValueError(f"keep={keep!r}: a whole number from 1 to {total}, or a fraction in (0, 1]")
        flaw = "not finite" if not scores.isfinite().all() else "" if scores.any() else "all 0"
        if flaw:
            raise ValueError(
                f"after {self._steps} steps the scores are {flaw}: call update() after each backward of a training "
                "that moves the biases"
            )
        count = max(1, round(keep * total)) if fraction else keep
        return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
