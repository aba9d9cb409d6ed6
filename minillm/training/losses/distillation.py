"""Distillation: a small model learns from what a large one says."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.ops import IGNORE
from minillm.training.losses.base import Loss, check, model_inputs, widen
from minillm.training.losses.language_model import ROWS, summed_cross_entropy


class DistillationLoss:
    """A loss function: soft * T^2 KL(teacher || student) + hard * cross-entropy + cosine * (1 - cos of hidden states).

    KL, in nats, is between the distributions softmax(logits / T); T^2 keeps its gradient's size whatever T (Hinton et
    al. 2015, arXiv:1503.02531, section 2). The cross-entropy is that with the labels. The cosine, between the hidden
    states that the two heads read, needs models of equal width. All three are means over the labels that count, which
    may be those of a masked, a causal or an encoder-decoder model; the metrics `soft`, `hard` and `cosine` are they.
    The default weights and T are those of DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 3, and the script
    they published).

    The teacher runs in eval mode and without gradients; it is no part of the student, so no optimizer sees it.

    Example: `Trainer(student, DistillationLoss(teacher), loader, config, run_dir)`
    """

    def __init__(
        self, teacher: nn.Module, *, temperature: float = 2.0, soft: float = 5.0, hard: float = 2.0, cosine: float = 1.0
    ):
        wrong = [] if temperature > 0 else [f"temperature {temperature} must be above 0"]
        if min(soft, hard, cosine) < 0 or soft + hard + cosine <= 0:
            wrong.append(f"soft {soft}, hard {hard}, cosine {cosine}: weights are not negative, and not all 0")
        if wrong:
            raise ValueError("DistillationLoss: " + "; ".join(wrong))
        self.teacher, self.temperature = teacher, temperature
        self.soft, self.hard, self.cosine = soft, hard, cosine

    def __call__(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        for model in (student, self.teacher):
            check("DistillationLoss", model, batch, {"tokens", "labels"}, {"hidden", "lm_head"})
        self._check_apart(student)
        inputs, named = model_inputs(batch)
        labels = batch["labels"].flatten()
        rows = (labels != IGNORE).nonzero().squeeze(1)
        hidden = student.hidden(*inputs, **named).flatten(0, -2)[rows]
        with torch.no_grad():
            told = self.teacher.to(hidden.device).eval().hidden(*inputs, **named).flatten(0, -2)[rows]
        size = max(len(rows), 1)  # a batch without labels is a zero that weighs nothing
        parts = {
            "soft": self._divergence(student.lm_head, hidden, told) / size,
            "hard": summed_cross_entropy(student.lm_head, hidden, labels[rows]) / size,
            "cosine": self._distance(hidden, told) / size,
        }
        value = self.soft * parts["soft"] + self.hard * parts["hard"] + self.cosine * parts["cosine"]
        return Loss(value, len(rows), {name: part.detach() for name, part in parts.items()})

    def _check_apart(self, student: nn.Module) -> None:
        mine = {id(parameter) for parameter in self.teacher.parameters()}
        if shared := [name for name, p in student.named_parameters() if p.requires_grad and id(p) in mine]:
            raise ValueError(
                f"DistillationLoss: teacher and student share {len(shared)} trainable parameters ({shared[0]}, ...), "
                "so that training the student would change its teacher: copy.deepcopy the teacher's modules"
            )

    def _divergence(self, head: nn.Module, hidden: Tensor, told: Tensor) -> Tensor:
        """T^2 KL summed over rows, a few rows of logits at a time."""
        chunks = zip(hidden.split(ROWS), told.split(ROWS), strict=True)
        return sum(checkpoint(self._chunk_divergence, head, *chunk, use_reentrant=False) for chunk in chunks)

    def _chunk_divergence(self, head: nn.Module, hidden: Tensor, told: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = widen(self.teacher.lm_head(told))
        student = widen(head(hidden))
        if student.shape != teacher.shape:
            raise ValueError(
                f"DistillationLoss: the student's vocabulary has {student.shape[-1]} tokens, the teacher's "
                f"{teacher.shape[-1]}: they must be the same"
            )
        log_p = (teacher / self.temperature).log_softmax(-1)
        log_q = (student / self.temperature).log_softmax(-1)
        return self.temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    def _distance(self, hidden: Tensor, told: Tensor) -> Tensor:
        if not self.cosine:
            return hidden.new_zeros(())
        if hidden.shape != told.shape:
            raise ValueError(
                f"DistillationLoss: hidden states have {hidden.shape[-1]} features in the student and {told.shape[-1]} "
                "in the teacher, which have no cosine: choose cosine=0, or models of one width"
            )
        return (1 - F.cosine_similarity(widen(hidden), widen(told), dim=-1)).sum()
