import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from minillm.training import TrainConfig, lr_at


def rates(make, steps: int, lr: float) -> list[float]:
    """The learning rates of a transformers scheduler after 1 ... steps steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("steps, warmup", [(1, 0), (7, 0), (7, 6), (50, 5), (41, 10)])
@pytest.mark.parametrize(
    "schedule, low, make",
    [
        ("cosine", 0.0, lambda o, w, n, lr: get_cosine_schedule_with_warmup(o, w, n)),
        ("cosine", 0.1, lambda o, w, n, lr: get_cosine_with_min_lr_schedule_with_warmup(o, w, n, min_lr_rate=0.1)),
        ("linear", 0.0, lambda o, w, n, lr: get_linear_schedule_with_warmup(o, w, n)),
        ("linear", 0.2, lambda o, w, n, lr: get_polynomial_decay_schedule_with_warmup(o, w, n, lr_end=0.2 * lr)),
        ("constant", 0.0, lambda o, w, n, lr: get_constant_schedule_with_warmup(o, w)),
    ],
)
def test_equals_transformers(schedule, low, make, steps, warmup):
    config = TrainConfig(steps=steps, lr=3e-4, schedule=schedule, warmup_ratio=warmup / steps, min_lr_ratio=low)
    ours = [lr_at(step, config) for step in range(1, steps + 1)]
    expected = rates(lambda optimizer: make(optimizer, warmup, steps, 3e-4), steps, 3e-4)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-19)


def test_stays_low_beyond_the_end():
    assert lr_at(120, TrainConfig(steps=100, lr=1.0, min_lr_ratio=0.25)) == 0.25
