"""Where IncreLoRA's ranks go, and when: what happens to the layers of increlora_linear.py beside each optimizer step.

Source: Zhang et al. 2023 (arXiv:2308.12043). Knows layers, gradients and an optimizer; the training loop is not needed
(RankGrowth in minillm/training/rank_growth.py connects the two).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.increlora import IncreLoraConfig
from minillm.peft.record import choose

Blend = tuple[nn.Parameter, Tensor, Tensor]  # a parameter, its values before the step, the share of the step it makes


class RankAllocator:
    """Gives the layers of one IncreLoRA their ranks, from hooks on the optimizer.

    After each step: S = sum |dW * dL/d(dW)| / sqrt(numel) of every layer, its moving average I = b1 I + (1 - b1) S,
    that of its deviation U = b2 U + (1 - b2) |S - I|, and the score I * U. When it is time the layers of the highest
    scores grow, never beyond the budget; once that is reached, nothing is measured any more and the reserves are gone.

    A component that is new begins a learning rate of its own: warm-up again, then in a straight line down to 0 at the
    last step. That is what a parameter group of its own would give it, with Adam's moments starting there; here it is
    a share of the step that the optimizer makes: p_before + share * (p_after - p_before), row by row. Components that
    wait make no step at all, so weight decay does not touch them. (Weight decay and Adam's eps are the two things in
    which a share of the step differs from the step of a new optimizer.)
    """

    def __init__(self, model: nn.Module, name: str | None = None):
        tuning = choose(model, name, "grow")
        if not isinstance(tuning.config, IncreLoraConfig):
            raise ValueError(f"ranks grow in an IncreLoRA; {tuning.name!r} is {tuning.config.name}")
        self.config = tuning.config
        distinct = {id(layer): (name, layer) for name, layer in reversed(tuning.wrappers)}  # the first of two names
        self.layers = dict(reversed(distinct.values()))
        self.budget = self.config.target_rank * len(self.layers)
        self.step = 0
        # for each layer the steps at which it changed, each with its extent from then on
        self.history = {name: [(0, *layer.extent.tolist())] for name, layer in self.layers.items()}
        self.sensitivity = self.uncertainty = torch.zeros(len(self.layers), dtype=torch.float64)
        self._handles: list[Any] = []

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer by its original path."""
        return {name: history[-1][1] for name, history in self.history.items()}

    @property
    def complete(self) -> bool:
        return sum(self.ranks.values()) == self.budget

    def grew(self) -> bool:
        """Whether some layer got ranks after the last step."""
        return self.step > 0 and any(history[-1][0] == self.step for history in self.history.values())

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        warmup: int = 0,
        share: Callable[[int], float] = lambda step: 1.0,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """From now on grow beside `optimizer`, an Adam or AdamW, until `detach`.

        `steps` there are in all; a new component's learning rate climbs over `warmup` of them. `share(step)` is the
        learning rate of a step as a share of the highest. `reduce` sums over processes, so that all decide alike.
        Raises ValueError if the budget cannot be reached in so many steps.
        """
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(f"ranks grow beside Adam or AdamW, not {type(optimizer).__name__}")
        self.check_steps(steps)
        self.optimizer, self.steps, self.warmup, self.share, self.reduce = optimizer, steps, warmup, share, reduce
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        self._watch(not self.complete)

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if the budget cannot be reached in so many steps."""
        if not self.complete and (last := self._last_growth()) >= steps:
            raise ValueError(
                f"the ranks are to grow from {sum(self.ranks.values())} to {self.budget} ({len(self.layers)} layers of "
                f"target_rank={self.config.target_rank} on average), which takes until step {last}, but there are only "
                f"{steps} steps: train longer, or give more winners, a larger reserve, a smaller interval or warmup"
            )

    def detach(self) -> None:
        """Let the optimizer be."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watch(False)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, beside the model's parameters and buffers, as plain values."""
        return {
            "step": self.step,
            "history": {name: [list(moment) for moment in history] for name, history in self.history.items()},
            "sensitivity": self.sensitivity.tolist(),
            "uncertainty": self.uncertainty.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave. The model's parameters and buffers are to be those of that moment."""
        self.step = state["step"]
        self.history = {name: [tuple(moment) for moment in history] for name, history in state["history"].items()}
        self.sensitivity = torch.tensor(state["sensitivity"], dtype=torch.float64)
        self.uncertainty = torch.tensor(state["uncertainty"], dtype=torch.float64)

    def scores(self) -> Tensor:
        """Sensitivity times uncertainty of each layer (number of layers,)."""
        return self.sensitivity * self.uncertainty

    def _last_growth(self) -> int:
        """The step after which the last rank is given."""
        c = self.config
        each = min(c.winners, len(self.layers)) * c.reserve
        rounds = math.ceil((self.budget - sum(self.ranks.values())) / each)
        begin = max(self.step, c.warmup)
        return (begin // c.interval + rounds) * c.interval

    def _watch(self, watched: bool) -> None:
        for layer in self.layers.values():
            layer.watched, layer.importance = watched, 0.0

    @torch.no_grad()
    def _before_step(self) -> None:
        self.step += 1
        self._blends: list[Blend] = []
        for name, layer in self.layers.items():
            vectors, numbers = self._shares(self.history[name], layer.max_rank)
            where = {"dtype": layer.lora_A.dtype, "device": layer.lora_A.device}
            vectors, numbers = torch.tensor(vectors, **where), torch.tensor(numbers, **where)
            for parameter, share in (
                (layer.lora_A, vectors[:, None]),
                (layer.lora_B, vectors[None, :]),
                (layer.lora_E, numbers),
            ):
                self._blends.append((parameter, parameter.detach().clone(), share))

    @torch.no_grad()
    def _after_step(self) -> None:
        for parameter, before, share in self._blends:
            parameter.copy_(torch.lerp(before, parameter, share))  # exact at shares of 0 and 1
        self._blends = []
        if self.complete:
            return
        self._observe()
        if self.step > self.config.warmup and self.step % self.config.interval == 0:
            self._grow()

    def _shares(self, history: Sequence[tuple[int, int, int]], rows: int) -> tuple[list[float], list[float]]:
        """What share of the optimizer's step the rows of A and columns of B make, and what share the numbers of E.

        A and B of a component learn from when it is in the reserve, E from when it speaks; each begins then.
        """
        (_, rank, learning), *later = history
        vectors = [1.0] * learning + [0.0] * (rows - learning)
        numbers = [1.0] * rank + [0.0] * (rows - rank)
        for born, more, learns in later:
            share = self._restarted(born)
            vectors[learning:learns] = [share] * max(0, learns - learning)
            numbers[rank:more] = [share] * (more - rank)
            rank, learning = more, max(learning, learns)
        return vectors, numbers

    def _restarted(self, born: int) -> float:
        """What share of this step a component makes whose learning rate began after step `born`.

        Adam divides its moments by 1 - beta^step. Those of a new component hold `age` gradients only, with which
        a group of its own would have counted.
        """
        age, left = self.step - born, self.steps - born
        rate = age / self.warmup if age < self.warmup else max(0, left - age) / max(1, left - self.warmup)
        beta1, beta2 = self.optimizer.defaults["betas"]
        shrink = (1 - beta1**self.step) / (1 - beta1**age)
        shrink *= math.sqrt((1 - beta2**age) / (1 - beta2**self.step))
        usual = self.share(self.step)
        return rate / usual * shrink if usual else 0.0

    def _observe(self) -> None:
        found = [torch.as_tensor(layer.importance) for layer in self.layers.values()]
        found = self.reduce(torch.stack([s.to(self._device, torch.float64) for s in found]))
        beta1, beta2 = self.config.beta1, self.config.beta2
        self.sensitivity = beta1 * self.sensitivity.to(found.device) + (1 - beta1) * found
        deviation = (found - self.sensitivity).abs()
        self.uncertainty = beta2 * self.uncertainty.to(found.device) + (1 - beta2) * deviation
        self._watch(True)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).lora_A.device

    def _grow(self) -> None:
        """Give `winners * reserve` ranks, or what the budget has left, to the layers of the highest scores."""
        left = min(self.budget - sum(self.ranks.values()), self.config.winners * self.config.reserve)
        scores = self.scores().tolist()
        ranks = self.ranks
        for _, name in sorted(zip(scores, self.layers, strict=True), key=lambda pair: -pair[0]):
            given = min(self.config.reserve, self.layers[name].max_rank - ranks[name], left)
            if given:
                ranks[name] += given
                left -= given
        done = sum(ranks.values()) == self.budget
        for name, layer in self.layers.items():
            if done or ranks[name] > self.ranks[name]:
                learning = ranks[name] if done else min(ranks[name] + self.config.reserve, layer.max_rank)
                self.history[name].append((self.step, ranks[name], learning))
                layer.extent.copy_(torch.tensor([ranks[name], learning]))
        self._watch(not done)
