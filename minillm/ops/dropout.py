"""Dropout that is not stored: whether a number is dropped is computed from a seed and its place, whenever it is asked.

So nothing of the size of the input is kept for the backward pass, and one seed drops the same numbers on every device
and in every implementation. In PyTorch's operations that takes some 30 of them; a kernel does it in registers
(csrc/cpu/dropout.h, csrc/cuda/dropout.cuh). Source: Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"):
a counter, mixed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.ops.registry import Op

STEPS = 2**24  # a probability is rounded to a whole number of such parts, which float32 holds exactly
WORD = 2**32 - 1  # int64 holds what in the kernels is a number of 32 bits
GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: its multiples are far from each other

Seed = Tensor | int  # int64, one number


def dropout_seed() -> Int[Tensor, ""]:
    """A new seed from torch's generator of the CPU: `torch.manual_seed` and a restored state decide what is dropped."""
    return torch.randint(2**62, (), device="cpu")


@Op
def dropout(x: Float[Tensor, "*batch D"], p: float, seed: Seed | None = None) -> Float[Tensor, "*batch D"]:
    """x with each number dropped, that is 0, with probability p, and the others divided by 1 - p.

    Semantics: x * kept(rows, D, p, seed) / (1 - p), where all dimensions but the last are one of rows.
    seed: int64, on the CPU also where x is on a GPU, so that reading it waits for nothing; see `dropout_seed`.
    Raises ValueError for a p outside [0, 1), or above 0 without a seed.
    """
    check_dropout(p, seed)
    if p == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return drop(rows, p, kept(*rows.shape, p, seed, x.device)).view(x.shape)


def check_dropout(p: float, seed: Seed | None) -> None:
    """Raise ValueError unless p is a probability below 1 and, above 0, has a seed."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: a probability in [0, 1), not {p!r}")
    if p and seed is None:
        raise ValueError(f"dropout {p} without a seed: pass seed=dropout_seed(), which torch's generator draws")


def kept(rows: int, columns: int, p: float, seed: Seed, device: torch.device | str) -> Bool[Tensor, "N D"]:
    """Which of rows x columns numbers are kept: those of whose own random number the upper 24 bits are not below p."""
    row, column = (torch.arange(size, device=device) for size in (rows, columns))
    low, high = seed & WORD, seed >> 32 & WORD
    key = mix(mix(row + low & WORD) ^ (mix((row >> 32) + high & WORD) + GOLDEN & WORD))
    random = mix(key[:, None] + column * GOLDEN & WORD) >> 8
    return random >= round(p * STEPS)


def mix(x: Tensor) -> Tensor:
    """32 bits, each of which depends on every bit of x. Source: Wellons 2018, "Prospecting for hash functions"."""
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def drop(x: Tensor, p: float, keep: Tensor) -> Tensor:
    """x where `keep`, divided by 1 - p, else 0; p as the whole number of steps that it is rounded to."""
    return x * keep * (STEPS / (STEPS - round(p * STEPS)))
