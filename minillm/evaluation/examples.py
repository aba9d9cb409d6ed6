"""How well a model does on labelled examples, by the loss it was trained with."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from minillm.training import Loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    loss_fn: Callable[[nn.Module, Mapping[str, Tensor]], Loss],
) -> dict[str, float]:
    """Mean loss and metrics (accuracy, ...) of `loss_fn` over all `batches`, and `count`, what they are means of.

    The model is put into eval mode and back; each example weighs the same, however the batches are cut.

    Example: `evaluate(model, example_batches(dev, 32, tokenizer.pad_id), classification_loss)`
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        losses = [loss_fn(model, {name: x.to(device) for name, x in batch.items()}) for batch in batches]
    finally:
        model.train(training)
    count = math.fsum(float(loss.weight) for loss in losses)
    if not count:
        raise ValueError(f"nothing to evaluate: the {len(losses)} batches count no label")
    columns = [{"loss": loss.value, **loss.metrics} for loss in losses]
    means = {
        name: math.fsum(float(column[name]) * float(loss.weight) for column, loss in zip(columns, losses, strict=True))
        for name in columns[0]
    }
    return {name: total / count for name, total in means.items()} | {"count": count}
