"""What a loss function hands to the trainer, and how it talks to models and batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Loss(NamedTuple):
    """A mean and what it is a mean over, so that means over unequal batches can be joined exactly.

    value: the differentiable mean, a scalar. weight: the number of tokens or examples behind it; a tensor on the
    model's device costs no waiting for the device. metrics: further means over the same things, for the log.
    """

    value: Tensor
    weight: Tensor | float
    metrics: Mapping[str, Tensor | float] = {}


OWN_LOSS = (
    "A loss function is any function (model, batch) -> Loss; for another model or batch write your own:\n"
    "    def my_loss(model, batch):\n"
    "        logits = model(batch['inputs'])\n"
    "        count = len(batch['targets'])  # what the mean is over\n"
    "        return Loss(F.cross_entropy(logits, batch['targets']), count)\n"
    "    Trainer(model, my_loss, loader, config, run_dir)"
)


def check(name: str, model: nn.Module, batch: Mapping[str, Tensor], keys: set[str], attributes: set[str]) -> None:
    """One ValueError for all that the loss function `name` needs and does not find in the model or the batch."""
    wrong = []
    if missing := sorted(keys - batch.keys()):
        wrong.append(f"the batch has no {' and no '.join(missing)}; it has {sorted(batch)}")
    if missing := sorted(attribute for attribute in attributes if getattr(model, attribute, None) is None):
        wrong.append(
            f"{type(model).__name__} has no {' and no '.join(missing)}; a language model here offers "
            "hidden(tokens, mask=, positions=), what the head reads, and lm_head, the head"
        )
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong) + f".\n{OWN_LOSS}")


def model_inputs(batch: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """What of a batch goes into a model: (source and) tokens by place, the rest by name and only if it is there."""
    first = [batch[name] for name in ("source", "tokens") if name in batch]
    names = ("source_mask", "mask", "token_types", "positions")
    return first, {name: batch[name] for name in names if name in batch}


def widen(x: Tensor) -> Tensor:
    """float32 at least: sums of exponentials in half precision are not to be trusted."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
