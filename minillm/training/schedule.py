"""The learning rate as a function of the step."""

import math

from minillm.training.config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """The learning rate of step number `step`, counted from 1 to `config.steps`.

    It climbs in a straight line over the first `warmup_ratio` of the steps, against Adam's badly estimated variances
    at the start (Goyal et al. 2017, arXiv:1706.02677, section 2.2; Liu et al. 2020, arXiv:1908.03265), then falls to
    `min_lr_ratio` of itself at the last step: along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983,
    equation 5), in a straight line, or not at all.
    """
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    height = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)
