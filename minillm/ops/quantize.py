"""Weights in 4 bits: NormalFloat with a scale for each block of weights, and those scales in 8 bits.

Source: Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; the 8-bit code is that of Dettmers 2015
(arXiv:1511.04561), in its signed form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from minillm.ops.registry import Op

OUTERMOST = 0.9677083  # probability of the last quantile: 1 - (1/30 + 1/32) / 2, half a step before infinity
SCALE_BLOCK = 256  # scales that share a scale of their own in double quantization
CHUNK = 2**18  # weights worked on at a time: the temporaries stay in the cache, however large the weight


def _normal_float() -> tuple[float, ...]:
    """The 16 values of NF4: quantiles of N(0, 1) over the largest, 8 steps of probability above 0 and 7 below.

    Two halves, because sixteen equal quantiles have no exact 0, and zeros in a weight must stay zeros.
    """
    steps = {"dtype": torch.float64, "device": "cpu"}
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, **steps)[:-1])
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, **steps)[:-1])
    values = torch.cat([below, above, above.new_zeros(1)]).sort().values
    return tuple((values / values.max()).tolist())


def _dynamic_exponent() -> tuple[float, ...]:
    """The 256 values of a signed 8-bit number whose bits go to the exponent where it is small.

    The decade 10^(i-7) .. 10^(i-6), i = 0 .. 6, is cut into 2^i equal parts whose middles are values, with both signs;
    besides there are 0 and 1.
    """
    parts = [(10.0 ** (i - 6), (0.1 + 0.9 * (k + 0.5) / 2**i)) for i in range(7) for k in range(2**i)]
    positive = [decade * part for decade, part in parts]
    return tuple(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


NF4, INT8 = _normal_float(), _dynamic_exponent()


class QuantTensor(NamedTuple):
    """A weight in NF4: block b of the flattened weight is about absmax[b] * NF4[codes]; the last one may be padded.

    With double quantization `absmax` is in 8 bits too: the scale is absmax2[b // 256] * INT8[absmax[b]] + offset. Both
    code books are among the tensors, so they are where the codes are; `book` has the values of both codes of a byte.
    """

    codes: UInt8[Tensor, "blocks half_block"]  # two codes a byte, the first in the high four bits
    absmax: Tensor  # (blocks,), float32; or uint8, if double
    absmax2: Float[Tensor, "superblocks"] | None
    offset: Float[Tensor, ""] | None
    book: Float[Tensor, "256 2"]
    book8: Float[Tensor, "256"] | None
    shape: tuple[int, ...]

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return 2 * self.codes.shape[1]

    def scales(self) -> Float[Tensor, "blocks"]:
        """The scale of each block, as dequantization uses it."""
        if self.absmax2 is None:
            return self.absmax
        scales = self.absmax2.repeat_interleave(SCALE_BLOCK)[: len(self.absmax)]
        return self.book8.index_select(0, self.absmax.int()) * scales + self.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers: made in float32 at least, rounded once to `dtype`."""
        return nf4_dequantize(self, dtype)


@Op
def nf4_dequantize(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """The weight as numbers, in its shape: each code's value times the scale of its block, rounded once to `dtype`."""
    numbers = torch.empty(len(weight.codes), weight.block, dtype=dtype, device=weight.codes.device)
    wide = torch.promote_types(dtype, torch.float32)
    rows = CHUNK // weight.block or 1
    for part, codes, scales in zip(*(t.split(rows) for t in (numbers, weight.codes, weight.scales())), strict=True):
        part.copy_(unpack(codes, weight.book).to(wide) * scales[:, None])
    count = torch.Size(weight.shape).numel()
    return numbers.view(-1)[:count].view(weight.shape)


@Op
def nf4_quantize(
    weight: Float[Tensor, "..."], block: int
) -> tuple[UInt8[Tensor, "blocks half_block"], Float[Tensor, "blocks"]]:
    """The codes of a weight, two a byte, and each block's largest absolute value; the last block is filled with 0."""
    flat, midpoints = weight.reshape(-1), _midpoints(NF4)
    blocks = -(-flat.numel() // block)
    codes = torch.empty(blocks, block // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    rows = CHUNK // block or 1
    for part, packed, scale in zip(flat.split(rows * block), codes.split(rows), absmax.split(rows), strict=True):
        x = F.pad(part.float(), (0, -len(part) % block)).view(-1, block)
        torch.amax(x.abs(), 1, out=scale)
        x = x / torch.where(scale > 0, scale, 1)[:, None]  # a block of zeros stays one
        nearest = torch.zeros_like(x, dtype=torch.uint8)
        for midpoint in midpoints:  # counting is twice as fast as torch.bucketize, which searches
            nearest += x > midpoint
        packed.copy_(pack(nearest))
    return codes, absmax


def quantize_nf4(weight: Tensor, *, block: int = 64, double: bool = True) -> QuantTensor:
    """Quantize a weight of any shape, flattened row by row, to NF4 with one scale per `block` weights.

    The scale is the largest absolute value, and each weight over its scale goes to the nearest of 16 values (between
    two, to the lower). Bits per weight: 4 + 32 / 64 = 4.5; with `double` quantization of the scales 4 + 8 / 64 +
    32 / (64 * 256) = 4.127. Raises ValueError for a block that is no even number above 0, an empty weight, and NaN or
    infinity in it.
    """
    check_size("block", block)
    check_weight(weight)
    codes, absmax = nf4_quantize(weight.detach(), block)
    if not absmax.isfinite().all():
        raise ValueError("a weight that holds NaN or infinity, or is too large for float32, cannot be quantized")
    book, absmax2, offset, book8 = pairs(NF4, weight.device), None, None, None
    if double:
        offset = absmax.double().mean().float()  # in float64: the same on every device
        absmax, absmax2 = _quantize_int8(absmax - offset)
        book8 = torch.tensor(INT8, dtype=torch.float32, device=weight.device)
    return QuantTensor(codes, absmax, absmax2, offset, book, book8, tuple(weight.shape))


def _quantize_int8(values: Float[Tensor, "N"]) -> tuple[UInt8[Tensor, "N"], Float[Tensor, "blocks"]]:
    """Nearest values of INT8 times the largest absolute value of each 256 numbers: their codes, and those values."""
    rows = F.pad(values, (0, -len(values) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    absmax = rows.abs().amax(1)
    rows = rows / torch.where(absmax > 0, absmax, 1)[:, None]
    midpoints = torch.tensor(_midpoints(INT8), dtype=torch.float32, device=rows.device)
    codes = torch.bucketize(rows, midpoints, out_int32=True)
    return codes.to(torch.uint8).flatten()[: len(values)], absmax


def _midpoints(book: tuple[float, ...]) -> list[float]:
    """Between each two neighbours of a sorted code book; in float32, as the numbers that are compared with them."""
    values = torch.tensor(book, dtype=torch.float32, device="cpu")
    return ((values[1:] + values[:-1]) / 2).tolist()


def pack(codes: UInt8[Tensor, "*rows even"]) -> UInt8[Tensor, "*rows half"]:
    """Two 4-bit codes a byte, the first in the high bits."""
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack(packed: UInt8[Tensor, "rows half"], book: Float[Tensor, "256 2"]) -> Float[Tensor, "rows even"]:
    """The values of packed codes. Each byte finds both of its values at once, as eight bytes: three times as fast."""
    both = book.view(torch.float64).flatten().index_select(0, packed.flatten().int())
    return both.view(torch.float32).view(len(packed), -1)


def pairs(book: Sequence[float | int], device: torch.device) -> Float[Tensor, "256 2"]:
    """For each byte, the values in a code book of 16 of its first and its second code."""
    values = torch.tensor(book, dtype=torch.float32, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)


def check_size(name: str, size: object) -> None:
    """Refuse a size of blocks or groups that two codes a byte do not fill."""
    if type(size) is not int or size < 2 or size % 2:
        raise ValueError(f"{name}: an even whole number above 0 (two codes share a byte), not {size!r}")


def check_weight(weight: Tensor) -> None:
    """Refuse what is no weight."""
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"only floating-point weights can be quantized, not {weight.dtype} {tuple(weight.shape)}")
