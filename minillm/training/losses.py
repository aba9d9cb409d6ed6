"""What a loss function hands to the trainer, and the loss of a causal language model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.ops import IGNORE, linear_cross_entropy

ROWS = 256  # hidden states whose logits exist at once


class Loss(NamedTuple):
    """A mean and what it is a mean over, so that means over unequal batches can be joined exactly.

    value: the differentiable mean, a scalar. weight: the number of tokens or examples behind it; a tensor on the
    model's device costs no waiting for the device. metrics: further means over the same things, for the log.
    """

    value: Tensor
    weight: Tensor | float
    metrics: Mapping[str, Tensor | float] = {}


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of the labels that count: labels[b, t] is the token to be said after tokens[b, t].

    `model` offers `hidden(tokens, mask=, positions=)` and `lm_head`. A plain linear head and its loss are one op; any
    other head (an adapter around it, for example) is called, a few rows at a time and again in the backward pass. So
    the logits of the whole batch never exist (a plain head's forward hooks do not run).
    """
    if missing := {"tokens", "labels"} - batch.keys():
        raise ValueError(f"the batch has no {' and no '.join(sorted(missing))}; it has {sorted(batch)}")
    hidden = model.hidden(batch["tokens"], mask=batch.get("mask"), positions=batch.get("positions"))
    hidden, labels, head = hidden.flatten(0, -2), batch["labels"].flatten(), model.lm_head
    if type(head) is nn.Linear:
        total = linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, chunk=ROWS)
    else:
        chunks = zip(hidden.split(ROWS), labels.split(ROWS), strict=True)
        total = sum(checkpoint(_summed_loss, head, *chunk, use_reentrant=False) for chunk in chunks)
    count = (labels != IGNORE).sum()
    return Loss(total / count.clamp(min=1), count)  # a batch without labels is a zero that weighs nothing


def _summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction="sum")
