"""Losses of models with a head for labels: classes, tags, answer spans, choices, numbers.

All means are over the labels that count, that is, are not -100, and so is the metric `accuracy`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.ops import IGNORE
from minillm.training.losses.base import Loss, check, model_inputs, widen


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of labels (B,) int64 against the model's logits (B, n)."""
    return _class_loss("classification_loss", _run("classification_loss", model, batch), batch["labels"])


def choice_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of the right candidates (B,) against the model's scores (B, C).

    The tokens are (B, C, T), a row for each candidate. Source: Radford et al. 2018 (GPT), section 3.3.
    """
    return _class_loss("choice_loss", _run("choice_loss", model, batch), batch["labels"])


def tagging_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of a label for each token, (B, T), against the model's logits (B, T, n).

    -100 stands on padding, special tokens and, as a rule, all but the first piece of a word (Devlin et al. 2018,
    arXiv:1810.04805, section 5.3).
    """
    return _class_loss("tagging_loss", _run("tagging_loss", model, batch), batch["labels"])


def span_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy, in nats, of where answers start and end, (B, 2), against the model's logits (B, T, 2).

    A place outside 0..T-1 (cut off, or no answer) does not count. The mean is over places, so that it is the mean of
    the start's and the end's losses whenever they count together. Source: Devlin et al. 2018, section 4.2.
    """
    logits, places = _run("span_loss", model, batch), batch["labels"]
    if logits.dim() != 3 or logits.shape[2] != 2:
        raise ValueError(f"span_loss: logits are {tuple(logits.shape)}; a start and an end, (B, T, 2), are expected")
    outside = (places < 0) | (places >= logits.shape[1])
    if "mask" in batch and (lost := (~outside & ~batch["mask"].gather(1, places.masked_fill(outside, 0))).any(1)).any():
        raise ValueError(f"span_loss: answers on padding in rows {lost.nonzero().flatten()[:10].tolist()}")
    return _class_loss("span_loss", logits.mT, places.masked_fill(outside, IGNORE))


def multi_label_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean binary cross-entropy, in nats, of labels (B, n) from 0 to 1 against the model's logits (B, n).

    Each of the B n labels counts by itself, unless it is -100 (not known). Right is a logit on the label's side of 0.
    """
    logits, labels = _run("multi_label_loss", model, batch), batch["labels"]
    counts = labels != IGNORE
    wrong = []
    if logits.shape != labels.shape:
        wrong.append(f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}: one label for each logit")
    if bad := labels[counts & ~((labels >= 0) & (labels <= 1))].unique()[:5].tolist():
        wrong.append(f"labels {bad} are not from 0 to 1 (nor {IGNORE}, not known)")
    if wrong:
        raise ValueError("multi_label_loss: " + "; ".join(wrong))
    logits, labels, count = widen(logits), labels.to(logits.dtype), counts.sum()
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
    right = ((logits > 0) == (labels > 0.5)) & counts
    return _mean(losses.masked_fill(~counts, 0).sum(), count, {"accuracy": right.sum()})


def regression_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Mean squared error of labels (B,) or (B, n) float against the model's outputs; (B, 1) goes with (B,).

    Any number is a label here, -100 too. The metric `absolute_error` is the mean distance in the labels' unit.
    """
    outputs, labels = _run("regression_loss", model, batch), batch["labels"]
    if labels.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] == 1:
        outputs = outputs.squeeze(1)
    if outputs.shape != labels.shape:  # broadcasting (B, 1) with (B,) would compare everything with everything
        raise ValueError(
            f"regression_loss: labels are {tuple(labels.shape)}, outputs {tuple(outputs.shape)}: not alike"
        )
    outputs = widen(outputs)
    errors = outputs - labels.to(outputs.dtype)
    count = torch.tensor(labels.numel(), device=labels.device)
    return _mean(errors.square().sum(), count, {"absolute_error": errors.abs().sum()})


def _run(name: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    check(name, model, batch, {"tokens", "labels"}, set())
    inputs, named = model_inputs(batch)
    return model(*inputs, **named)


def _class_loss(name: str, logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of logits (..., n) and labels (...)."""
    _check_classes(name, logits, labels)
    logits, labels = widen(logits).flatten(0, -2), labels.flatten().long()
    count = (labels != IGNORE).sum()
    right = (logits.argmax(-1) == labels).sum()  # -100 is no class, so never right
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return _mean(total, count, {"accuracy": right})


def _check_classes(name: str, logits: Tensor, labels: Tensor) -> None:
    wrong = []
    if logits.shape[:-1] != labels.shape:
        wrong.append(
            f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}: one label for each row is needed"
        )
    if labels.is_floating_point():
        wrong.append(
            f"labels are {labels.dtype}; classes are whole numbers (multi_label_loss and regression_loss differ)"
        )
    elif bad := labels[(labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))].unique()[:5].tolist():
        wrong.append(f"labels {bad} are not among the {logits.shape[-1]} classes 0..{logits.shape[-1] - 1}")
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong))


def _mean(total: Tensor, count: Tensor, sums: dict[str, Tensor]) -> Loss:
    """A batch without labels is a zero that weighs nothing."""
    size = count.clamp(min=1)
    return Loss(total / size, count, {name: (value / size).detach() for name, value in sums.items()})
