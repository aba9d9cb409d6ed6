"""The language-model head and its cross-entropy, forward and backward: in chunks of rows against the plain way.

    python benchmarks/run.py head_loss

Both give the same loss and the same gradients for the hidden states and, unless it is frozen, for the head's weight.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import Goal, added_memory, compare, compare_memory, same_gradients
from torch import Tensor

from minillm.ops import linear_cross_entropy

ROWS, HIDDEN, VOCAB = 2048, 256, 8192

GOALS = [
    Goal("head + loss, time / plain", ("trained head", "time_ratio"), 0.80),
    Goal("head + loss, memory beside the gradients / plain", ("trained head", "memory_ratio"), 0.10),
]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


LOSSES = {"chunked": linear_cross_entropy, "plain": plain}


def inputs(rows: int = ROWS, hidden: int = HIDDEN, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states, weight = torch.randn(rows, hidden, requires_grad=True), torch.randn(vocab, hidden).mul_(0.02)
    return states, weight.requires_grad_(), torch.randint(vocab, (rows,))


def forward_backward(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    hidden.grad = weight.grad = None
    (loss(hidden, weight, targets) / len(targets)).backward()


def gradients(loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    hidden, weight, targets = inputs()
    forward_backward(loss, hidden, weight, targets)
    return {"hidden": hidden.grad, "weight": weight.grad}


def peak(side: str) -> float:
    """MiB that forward and backward need beside the gradients they return, after a small run has loaded all code."""
    forward_backward(LOSSES[side], *inputs(16, 32, 64))
    hidden, weight, targets = inputs()
    added = added_memory(lambda: forward_backward(LOSSES[side], hidden, weight, targets))
    return added - (hidden.grad.nbytes + weight.grad.nbytes) / 2**20


def measure(repeats: int = 15) -> dict:
    same_gradients(gradients(linear_cross_entropy), gradients(plain), tolerance=1e-5)
    hidden, weight, targets = inputs()
    result = {}
    for name, table in (("trained head", weight), ("frozen head", weight.detach())):
        sides = {side: partial(forward_backward, loss, hidden, table, targets) for side, loss in LOSSES.items()}
        result[name] = compare(sides, "chunked", "plain", repeats=repeats)
    result["trained head"] |= compare_memory(__file__, "chunked", "plain")
    return result


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--memory"], "run it by: python benchmarks/run.py head_loss"
    print(peak(sys.argv[2]))
