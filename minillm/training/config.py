"""Everything that decides how a model is trained, apart from the model, the loss and the data."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from minillm.config import nearest, seed_flaw

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The optimizer's defaults are GPT-3's (Brown et al. 2020, arXiv:2005.14165, appendix B).

    Times are counted in optimizer steps; 0 switches off what happens "every" so many steps or "after" so many.
    """

    steps: int = 1000
    lr: float = 1e-3  # the highest learning rate, reached when the warm-up ends
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.05  # share of the steps in which the rate climbs from 0 to lr
    min_lr_ratio: float = 0.1  # the last step's rate, as a share of lr (not used by "constant")
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # gradients are scaled down to this norm; 0: never
    accumulate: int = 1  # batches whose gradients make one step
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast: the weights stay float32
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0  # of dropout and whatever else is random in a step
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 1
    eval_every: int = 100  # and always after the last step
    save_every: int = 100  # and always after the last step
    keep_checkpoints: int = 2
    patience: int = 0  # evaluations in a row without improvement that end the run; its result are the best weights then

    def __post_init__(self):
        wrong = [
            f"{name}={getattr(self, name)!r}: expected {expected}"
            for name, (fits, expected) in _RULES.items()
            if not fits(getattr(self, name))
        ]
        wrong += seed_flaw(self.seed)
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("device", DEVICES)):
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}: did you mean {nearest(str(value), choices)}?")
        if not wrong and self.patience and not self.eval_every:
            wrong.append(f"patience={self.patience}: needs evaluations during training, but eval_every=0")
        if wrong:
            raise ValueError("this training cannot be done:\n  " + "\n  ".join(wrong))


def _whole(low: int) -> tuple[Any, str]:
    return lambda x: type(x) is int and x >= low, f"a whole number, at least {low}"


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> tuple[Any, str]:
    def fits(x: Any) -> bool:
        inside = type(x) in (int, float) and math.isfinite(x) and low <= x <= high
        return inside and not (open_low and x == low) and not (open_high and x == high)

    above = f"above {low}" if open_low else f"at least {low}"
    below = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high}"
    return fits, f"a number {above}{below}"


_FLAG = (lambda x: type(x) is bool, "true or false")
_RULES = {
    "steps": _whole(1),
    "lr": _number(0, open_low=True),
    "warmup_ratio": _number(0, 1),
    "min_lr_ratio": _number(0, 1),
    "weight_decay": _number(0),
    "beta1": _number(0, 1, open_high=True),
    "beta2": _number(0, 1, open_high=True),
    "eps": _number(0, open_low=True),
    "clip": _number(0),
    "accumulate": _whole(1),
    "gradient_checkpointing": _FLAG,
    "compile": _FLAG,
    "log_every": _whole(1),
    "eval_every": _whole(0),
    "save_every": _whole(0),
    "keep_checkpoints": _whole(1),
    "patience": _whole(0),
}
