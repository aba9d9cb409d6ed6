"""Adapters of layers that are apart here and fused in the Hub's models: GPT-2's c_attn, Phi-3's qkv_proj.

Three LoRAs on q, k and v are one on the fused matrix: their A one below the other, their B as blocks of a block
matrix, so its rank is the sum of theirs. Where they have the same A, as a LoRA that was trained on the fused matrix
has, that A serves all three and the rank stays.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.models.families.module_names import HubModule


class LoRA(NamedTuple):
    """The update scale * B A of a layer; A (R, Din), B (Dout, R)."""

    A: Tensor
    B: Tensor
    scale: float


def fuse(place: HubModule, loras: Mapping[str, LoRA]) -> LoRA:
    """The LoRA of the fused matrix from those of some of its parts; the others' rows stay zero.

    Exact where the scales are equal; otherwise B is rounded once, by the quotient of the scales.
    """
    present = [loras[part] for part in place.parts if part in loras]
    if len(place.parts) == 1:
        return present[0]
    first = present[0]
    shared = all(lora.scale == first.scale and torch.equal(lora.A, first.A) for lora in present)
    A = first.A if shared else torch.cat([lora.A for lora in present])
    B, column = A.new_zeros(sum(place.sizes), len(A)), 0
    for rows, part in zip(B.split(place.sizes), place.parts, strict=True):
        if part in loras:
            lora = loras[part]
            rows[:, column : column + len(lora.A)] = lora.B * (lora.scale / first.scale)
            column += 0 if shared else len(lora.A)
    return LoRA(A, B, first.scale)


def cut(place: HubModule, fused: LoRA, wanted: Mapping[str, tuple[int, float]]) -> dict[str, LoRA]:
    """The LoRAs of the `wanted` parts, each with its rank and scale, from that of the fused matrix.

    If the ranks add up to the fused one's, `fuse` has put them together; otherwise each part gets the whole A, which
    computes the same.
    """
    stacked = sum(rank for rank, _ in wanted.values()) == len(fused.A)
    loras, column = {}, 0
    for rows, part in zip(fused.B.split(place.sizes), place.parts, strict=True):
        if part in wanted:
            rank, scale = wanted[part]
            columns = slice(column, column + rank) if stacked else slice(None)
            loras[part] = LoRA(fused.A[columns].clone(), rows[:, columns] * (fused.scale / scale), scale)
            column += rank
    return loras


def fuse_factors(place: HubModule, factors: Mapping[str, Tensor]) -> Tensor:
    """(IA)3's factors (Dout, 1) of the fused outputs; a part without any keeps its outputs, by ones."""
    one = next(iter(factors.values()))
    sizes = zip(place.parts, place.sizes, strict=True)
    return torch.cat([factors[part] if part in factors else one.new_ones(size, 1) for part, size in sizes])
