"""One backward pass gives every parameter the gradient it has in transformers, under the loss that belongs to the head.

Losses are torch's, and equal to those that their classes compute from the same labels. Nothing is excluded: no token is
a pad, whose row transformers gives no gradient, and rows of position tables that no position uses have none on either
side.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.families import FAMILIES
from minillm.models.families.keys import entries
from minillm.models.heads import SentenceEmbedder


def labels_for(task: str, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels as transformers names them; -100 does not count."""
    rows, last = scores.shape[0], scores.shape[-1]
    if task == "span":
        return dict(start_positions=torch.tensor([0, 3, 5]), end_positions=torch.tensor([2, 3, 10]))
    if task == "regression":
        return dict(labels=torch.randn(rows, dtype=scores.dtype))
    if task == "multi_label":
        return dict(labels=(torch.rand(scores.shape) < 0.5).to(scores.dtype))
    if task in ("classification", "choice"):
        return dict(labels=torch.randint(0, last, (rows,)))
    labels = torch.randint(0, last, scores.shape[:2])
    labels[:, ::4] = -100
    if task == "lm" and "source" not in batch:  # they shift the labels of decoders themselves
        return dict(labels=batch["tokens"].where(labels != -100, -100))
    return dict(labels=labels)


def loss_of(task: str, scores: Tensor, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    if task == "span":
        starts, ends = scores.unbind(-1)
        return (F.cross_entropy(starts, labels["start_positions"]) + F.cross_entropy(ends, labels["end_positions"])) / 2
    if task in ("embedding", "body"):
        return scores.square().sum()
    wanted = labels["labels"]
    if task == "regression":
        return F.mse_loss(scores.squeeze(-1), wanted)
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(scores, wanted)
    if task == "lm" and "source" not in batch:
        scores, wanted = scores[:, :-1], wanted[:, 1:]
    return F.cross_entropy(scores.flatten(0, -2), wanted.flatten())


def gradients(ours: nn.Module, family: str, class_name: str) -> dict[str, Tensor]:
    """Ours by the keys of their file, joined as they are stored there."""
    (found,) = (f for f in FAMILIES if f.name == family)
    pooled = isinstance(ours, SentenceEmbedder)
    fits = [a for a in found.architectures if a.name == class_name and (a.task == "embedding") == pooled]
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    joined = {entry.key: entry.join(grads) for entry in entries(found, fits[0], ours, fits[0].prefix)}
    if not ours.config.tie_embeddings:
        joined |= {read: joined.pop(unused) for read, unused in fits[0].untied.items() if unused in joined}
    return joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_gradients(member, dtype, twins, batch_of, ask_theirs, error_of, agree):
    ours, theirs = twins(member, dtype)
    batch = batch_of(ours, member.task)
    ours.zero_grad(set_to_none=True)
    theirs.zero_grad(set_to_none=True)
    scores = ours(**batch)
    labels = {} if member.task in ("embedding", "body") else labels_for(member.task, scores, batch)
    expected, named_loss = ask_theirs(theirs, member, batch, **labels)
    losses = [loss_of(member.task, x, batch, labels) for x in (scores, expected)]
    if labels:
        assert abs(losses[0] - named_loss) < 1e-5 * named_loss  # in float32, whatever the model's type
    for loss in losses:
        loss.backward()

    found = gradients(ours, member.case.family, member.class_name)
    known = dict(theirs.named_parameters(remove_duplicate=False))
    seen = {id(known[key]) for key in found}
    assert not [name for name, p in known.items() if p.grad is not None and id(p) not in seen]
    largest = max(p.grad.abs().max().item() for p in known.values() if p.grad is not None)
    for key, grad in found.items():
        size = known[key].grad.abs().max().item()
        # What shifts all scores of a softmax alike, as a key's bias or a span's, has no gradient but rounding.
        scale = largest if size < 1e-5 * largest else max(size, 0.01 * largest)
        agree(member, "gradients", dtype, error_of(grad, known[key].grad, scale))
