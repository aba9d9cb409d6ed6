"""Sentences for contrastive learning (Gao et al. 2021, arXiv:2104.08821): alone, in pairs, or with a hard negative."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.encoder_decoder import pad_rows
from minillm.data.objective import Objective


@dataclass(frozen=True)
class Sentences(Objective):
    """The rows as they are: unsupervised SimCSE needs nothing else, its pairs come from two passes with dropout."""

    def __call__(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"tokens": tokens, "mask": mask}


def sentence_groups(groups: Sequence[Sequence[Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """A batch for `contrastive_loss` from token ids of (sentence, positive) or (sentence, positive, hard negative).

    tokens, mask (B, T); positives, positives_mask (B, P); with triples also negatives, negatives_mask (B, N).
    """
    sizes = {len(group) for group in groups}
    if sizes not in ({2}, {3}):
        raise ValueError(
            f"every group is (sentence, positive) or every one (.., .., negative); got sizes {sorted(sizes)}"
        )
    if empty := [i for i, group in enumerate(groups) if not all(map(len, group))]:
        raise ValueError(f"groups {empty[:10]} hold an empty sentence")
    names = ("tokens", "mask"), ("positives", "positives_mask"), ("negatives", "negatives_mask")
    batch = {}
    for (tokens, mask), rows in zip(names, zip(*groups, strict=True), strict=False):
        batch[tokens], batch[mask] = pad_rows([torch.tensor(row) for row in rows], pad_id)
    return batch
