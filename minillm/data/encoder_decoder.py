"""Pairs of token sequences as an encoder-decoder's batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.ops import IGNORE


def encoder_decoder_batch(
    sources: Sequence[Tensor], targets: Sequence[Tensor], *, pad_id: int, decoder_start_id: int
) -> dict[str, Tensor]:
    """What an encoder reads and a decoder has to say, padded on the right to the longest of the B rows.

    source       (B, S) the encoder's tokens           source_mask  (B, S) True = a real one
    labels       (B, T) the targets, -100 on padding   mask         (B, T) True where there is a label
    tokens       (B, T) the decoder's inputs: the labels moved one to the right behind `decoder_start_id`, so that each
                        label is predicted from those before it (Sutskever et al. 2014, arXiv:1409.3215)
    Each source and target is one row (N,) of token ids; both end with their end-of-text token, if they have one.
    """
    wrong = []
    if len(sources) != len(targets) or not sources:
        wrong.append(f"{len(sources)} sources and {len(targets)} targets: give as many of both, at least one")
    for name, rows in (("source", sources), ("target", targets)):
        if empty := [i for i, row in enumerate(rows) if row.dim() != 1 or not len(row)]:
            wrong.append(f"{name} rows {empty[:10]} are empty or not 1-dimensional")
    if wrong:
        raise ValueError("encoder_decoder_batch: " + "; ".join(wrong))
    source, source_mask = pad_rows(sources, pad_id)
    labels, mask = pad_rows(targets, pad_id)
    start = torch.full_like(labels[:, :1], decoder_start_id)
    tokens = torch.cat([start, labels[:, :-1]], dim=1)
    labels = labels.masked_fill(~mask, IGNORE)
    return {"source": source, "source_mask": source_mask, "tokens": tokens, "labels": labels, "mask": mask}


def pad_rows(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, T) token ids, filled up on the right, and (B, T) True = a real token."""
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = True
    tokens = torch.full(mask.shape, pad_id, dtype=torch.int64)
    tokens[mask] = torch.cat(list(rows)).to(torch.int64)
    return tokens, mask
