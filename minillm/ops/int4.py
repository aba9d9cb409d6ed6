"""Weights in 4-bit whole numbers with a scale and a zero for each group of inputs.

Source: the asymmetric min/max quantization of QA-LoRA, Xu et al. 2023 (arXiv:2309.14717), section 3.2, with zeros that
stay real numbers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minillm.ops.quantize import CHUNK, check_size, check_weight, pack, pairs, unpack
from minillm.ops.registry import Op

LEVELS = 15  # the largest of the codes 0 .. 15


class Int4Tensor(NamedTuple):
    """A weight (Dout, Din) in 4-bit codes: scale * (codes - zero), with one scale and zero for G inputs of an output.

    L = Din / G groups. The zero is a real number: whatever is constant over a group's inputs can be added to the weight
    there, and the codes stay what they are.
    """

    codes: UInt8[Tensor, "groups half_group"]  # two a byte, the first in the high four bits; groups = Dout * L
    scale: Float[Tensor, "Dout L"]
    zero: Float[Tensor, "Dout L"]
    book: Float[Tensor, "256 2"]  # both codes of a byte, as numbers
    shape: tuple[int, int]

    @property
    def group(self) -> int:
        """Inputs that share a scale and a zero."""
        return 2 * self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "Dout Din"]:
        """The weight as numbers: made in float32 at least, rounded once to `dtype`."""
        return int4_dequantize(self, dtype)


@Op
def int4_dequantize(weight: Int4Tensor, dtype: torch.dtype) -> Float[Tensor, "Dout Din"]:
    """The weight as numbers: (code - zero) * scale, with those of the code's group, rounded once to `dtype`."""
    numbers = torch.empty(len(weight.codes), weight.group, dtype=dtype, device=weight.codes.device)
    wide, rows = torch.promote_types(dtype, torch.float32), CHUNK // weight.group or 1
    split = (t.split(rows) for t in (numbers, weight.codes, weight.scale.flatten(), weight.zero.flatten()))
    for part, codes, scale, zero in zip(*split, strict=True):
        part.copy_((unpack(codes, weight.book).to(wide) - zero[:, None]) * scale[:, None])
    return numbers.view(weight.shape)


def quantize_int4(weight: Tensor, *, group: int = 32) -> Int4Tensor:
    """Quantize a matrix (Dout, Din): in each group of `group` inputs of one output, 16 equal steps from min to max.

    Bits per weight: 4 + 2 * 32 / G, which is 6 for G = 32. Raises ValueError for a group size that is no even number
    above 0 or does not divide Din, what is no matrix, and NaN or infinity in it.
    """
    check_size("group", group)
    check_weight(weight)
    if weight.dim() != 2 or weight.shape[1] % group:
        raise ValueError(f"groups of {group} inputs need a matrix (Dout, Din) with Din a multiple, not {weight.shape}")
    (dout, din), rows = weight.shape, CHUNK // group or 1
    groups = weight.detach().reshape(-1, group)
    codes = torch.empty(len(groups), group // 2, dtype=torch.uint8, device=weight.device)
    scale, zero = (torch.empty(len(groups), dtype=torch.float32, device=weight.device) for _ in range(2))
    split = (t.split(rows) for t in (groups, codes, scale, zero))
    for part, packed, step, middle in zip(*split, strict=True):
        x = part.float()
        low, high = x.aminmax(dim=1)
        torch.div(high - low, LEVELS, out=step)
        step[step < 1e-30] = 1  # no spread: any step will do, and the zero has the value
        torch.div(-low, step, out=middle)
        x = (x / step[:, None] + middle[:, None]).round_().clamp_(0, LEVELS)
        packed.copy_(pack(x.to(torch.uint8)))
    if not (scale.isfinite() & zero.isfinite()).all():
        raise ValueError("a weight that holds NaN or infinity, or is too large for float32, cannot be quantized")
    book = pairs(range(LEVELS + 1), weight.device)
    return Int4Tensor(codes, scale.view(dout, -1), zero.view(dout, -1), book, (dout, din))
