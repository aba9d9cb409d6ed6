"""How well a language model predicts text it has not seen."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from minillm.training import Loss, causal_lm_loss


@torch.no_grad()
def language_model_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_bytes: int | None = None,
    loss_fn: Callable[[nn.Module, Mapping[str, Tensor]], Loss] = causal_lm_loss,
) -> dict[str, float]:
    """Mean loss in nats per token over all `batches`, perplexity = e^loss, and the number of tokens they count.

    `loss_fn` is the one of the model's kind: `masked_lm_loss` and `seq2seq_loss` count hidden or written tokens.

    With `num_bytes`, the UTF-8 bytes of the text that the counted tokens spell, also bits_per_byte = total nats /
    (ln 2 num_bytes), which compares models whose tokenizers differ (Gao et al. 2020, arXiv:2101.00027, section 3.1).
    The model is put into eval mode and back; each token weighs the same, however the batches are cut.

    Example: `language_model_loss(model, sequential_batches(file, 8, 256), num_bytes=file.meta.counted_bytes)`
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        losses = [loss_fn(model, {name: x.to(device) for name, x in batch.items()}) for batch in batches]
    finally:
        model.train(training)
    tokens = sum(int(loss.weight) for loss in losses)
    if not tokens:
        raise ValueError(f"nothing to evaluate: the {len(losses)} batches count no label (all are -100)")
    nats = math.fsum(float(loss.value) * int(loss.weight) for loss in losses)
    values = {"loss": nats / tokens, "perplexity": _exp(nats / tokens), "tokens": tokens}
    if num_bytes is not None:
        values["bits_per_byte"] = nats / math.log(2) / num_bytes
    return values


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # beyond, Python raises an error where other languages say infinity
