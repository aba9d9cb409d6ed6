"""The loss of sentence embeddings: what belongs together shall be nearer than all else in the batch."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.training.losses.base import Loss, check, widen


def contrastive_loss(model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 0.05) -> Loss:
    """Mean -log softmax over the batch of cosine(a_i, b_j) / temperature at j = i, in nats (InfoNCE).

    a_i is the model's embedding (B, D) of sentence i, and b_i
    - without `positives` that of the same sentence again, with other units dropped out (SimCSE's unsupervised form),
    - with `positives` (B, P) that of its partner. `negatives` (B, N), one hard negative for each, are further b_j.
    Each comes with its mask: `mask`, `positives_mask`, `negatives_mask`. The other sentences are those of one batch in
    one process: two halves, or two processes, are another loss than the whole.
    Source: Gao et al. 2021 (arXiv:2104.08821), equations 1, 4 and 5; InfoNCE: van den Oord et al. 2018
    (arXiv:1807.03748).
    """
    check("contrastive_loss", model, batch, {"tokens"}, set())
    a = _embed(model, batch, "tokens", "mask")
    paired = "positives" in batch
    b = _embed(model, batch, "positives", "positives_mask") if paired else _embed(model, batch, "tokens", "mask")
    others = _embed(model, batch, "negatives", "negatives_mask") if "negatives" in batch else a[:0]
    wrong = []
    if not temperature > 0:
        wrong.append(f"temperature {temperature} must be above 0")
    if len(b) != len(a):
        wrong.append(f"{len(b)} positives for {len(a)} sentences: one for each")
    elif len(b) + len(others) < 2:
        wrong.append("one sentence has nothing to differ from: batches of at least 2 are needed")
    elif not paired and model.training and torch.equal(a, b):
        wrong.append("two passes gave the same embeddings: without dropout in the model there is nothing to learn")
    if wrong:
        raise ValueError("contrastive_loss: " + "; ".join(wrong))
    with torch.autocast(a.device.type, enabled=False):  # in half precision cosines near 1 would be alike
        scores = a @ torch.cat([b, others]).T / temperature
    labels = torch.arange(len(a), device=a.device)
    right = (scores.argmax(-1) == labels).double().mean()
    return Loss(F.cross_entropy(scores, labels), len(a), {"accuracy": right})


def _embed(model: nn.Module, batch: Mapping[str, Tensor], tokens: str, mask: str) -> Tensor:
    """Unit vectors (B, D), in float32 at least."""
    named = {"mask": batch[mask]} if mask in batch else {}
    return F.normalize(widen(model(batch[tokens], **named)), dim=-1)
