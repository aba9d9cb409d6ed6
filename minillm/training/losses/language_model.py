"""The loss of models that say a token at every position: causal, masked, sequence to sequence."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.ops import IGNORE, linear_cross_entropy
from minillm.training.losses.base import Loss, check, model_inputs, widen

WRONG_KINDS = {  # these would run, and teach nothing
    ("causal_lm_loss", "encoder"): "sees the tokens it should predict",
    ("masked_lm_loss", "decoder"): "cannot see what follows a hidden token",
    ("seq2seq_loss", "decoder"): "reads no source",
    ("seq2seq_loss", "encoder"): "reads no source",
    ("causal_lm_loss", "encoder_decoder"): "needs a source",
}
ROWS = 256  # hidden states whose logits exist at once


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of the labels that count: labels[b, t] is the token to be said after tokens[b, t].

    `model` offers `hidden(tokens, mask=, positions=)` and `lm_head`. A plain linear head and its loss are one op; any
    other head (an adapter around it, for example) is called, a few rows at a time and again in the backward pass. So
    the logits of the whole batch never exist (a plain head's forward hooks do not run).
    """
    return _token_loss("causal_lm_loss", model, batch, {"tokens", "labels"})


def masked_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of the chosen tokens: labels[b, t] stood where the model now reads tokens[b, t].

    `model` offers `hidden(tokens, mask=, token_types=)` and `lm_head`, and its positions see each other in both
    directions. Everything else is as in `causal_lm_loss`. Source: Devlin et al. 2018 (arXiv:1810.04805), section 3.1.
    """
    return _token_loss("masked_lm_loss", model, batch, {"tokens", "labels"})


def seq2seq_loss(model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float = 0.0) -> Loss:
    """Mean cross-entropy, in nats, of the target's tokens, given the source and the target's tokens before.

    `model` offers `hidden(source, tokens, source_mask=, mask=)` and `lm_head`. With `label_smoothing` e the target is
    1 - e of the label and e of all V tokens alike (Szegedy et al. 2015, arXiv:1512.00567, section 7; Vaswani et al.
    2017, section 5.4: e = 0.1); the metric `nll` is the loss without it, whose exponential is the perplexity.

    Example: `Trainer(model, functools.partial(seq2seq_loss, label_smoothing=0.1), loader, config, run_dir)`
    """
    return _token_loss("seq2seq_loss", model, batch, {"source", "tokens", "labels"}, label_smoothing)


def _token_loss(
    name: str, model: nn.Module, batch: Mapping[str, Tensor], keys: set[str], smoothing: float = 0.0
) -> Loss:
    check(name, model, batch, keys, {"hidden", "lm_head"})
    kind = getattr(getattr(model, "config", None), "kind", None)  # models of other libraries have none
    if (name, kind) in WRONG_KINDS:
        raise ValueError(
            f"{name}: {type(model).__name__} is of kind {kind!r}, which {WRONG_KINDS[name, kind]}; the losses are "
            "causal_lm_loss for decoders, masked_lm_loss for encoders, seq2seq_loss for encoder-decoders"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"{name}: label_smoothing {smoothing} is not in [0, 1)")
    inputs, named = model_inputs(batch)
    hidden, labels, head = model.hidden(*inputs, **named).flatten(0, -2), batch["labels"].flatten(), model.lm_head
    count = (labels != IGNORE).sum()
    per_token = count.clamp(min=1)  # a batch without labels is a zero that weighs nothing
    nll = summed_cross_entropy(head, hidden, labels) / per_token
    if not smoothing:
        return Loss(nll, count)
    return Loss(nll + smoothing * _summed_margin(head, hidden, labels) / per_token, count, {"nll": nll.detach()})


def summed_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over `hidden` (N, D) of -log p(labels (N,)), a few rows of logits at a time."""
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, chunk=ROWS)
    return _in_chunks(_chunk_cross_entropy, head, hidden, labels)


def _summed_margin(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over labels that count of: the label's logit less the mean of all V logits.

    That is all that smoothing adds. With z the logits, y the label and c = log sum exp z, the smoothed loss is
    (1 - e) (c - z_y) + e (c - mean z) = (c - z_y) + e (z_y - mean z); and of a linear head both z_y and mean z are
    inner products with one row, so the logits need not exist for them either.
    """
    if type(head) is not nn.Linear:
        return _in_chunks(_chunk_margin, head, hidden, labels)
    rows = (labels != IGNORE).nonzero().squeeze(1)
    weight, labels = widen(head.weight), labels[rows]
    margin = (widen(hidden[rows]) * (weight[labels] - weight.mean(0))).sum()
    return margin if head.bias is None else margin + (head.bias[labels] - head.bias.mean()).sum()


def _in_chunks(function, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    chunks = zip(hidden.split(ROWS), labels.split(ROWS), strict=True)
    return sum(checkpoint(function, head, *chunk, use_reentrant=False) for chunk in chunks)


def _chunk_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(widen(head(hidden)), labels, ignore_index=IGNORE, reduction="sum")


def _chunk_margin(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    rows = (labels != IGNORE).nonzero().squeeze(1)
    logits = widen(head(hidden[rows]))
    return (logits.gather(1, labels[rows, None]).squeeze(1) - logits.mean(1)).sum()
