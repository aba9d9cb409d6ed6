"""Dropout computed from a seed: the numbers of the definition against Python's own, and chance against its laws."""

import pytest
import torch

from minillm import ops
from minillm.ops.dropout import kept

WORD = 2**32


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % WORD
    x = (x ^ x >> 15) * 0x846CA68B % WORD
    return x ^ x >> 16


def by_hand(row: int, column: int, p: float, seed: int) -> bool:
    """In Python's whole numbers, which have no sign and no limit."""
    high = mix((row // WORD + seed // WORD) % WORD)
    key = mix(mix((row + seed) % WORD) ^ (high + 0x9E3779B9) % WORD)
    return mix((key + column * 0x9E3779B9) % WORD) >> 8 >= round(p * 2**24)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999, 1e-9])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**62 - 1])
def test_each_number_is_that_of_whole_numbers(seed, p):
    expected = [[by_hand(row, column, p, seed) for column in range(9)] for row in range(13)]
    assert kept(13, 9, p, seed, "cpu").tolist() == expected
    assert kept(13, 9, p, torch.tensor(seed), "cpu").tolist() == expected


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_as_many_are_dropped_as_should_and_none_twice(p):
    """Within 5 standard deviations, in all and in each row and column; other seeds drop independently."""
    n = 400
    keep = kept(n, n, p, 1234, "cpu").double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / n
    for dim in (0, 1):
        assert (keep.mean(dim) - (1 - p)).abs().max() < 5 * deviation / n**0.5
    for seed in (1235, 1234 + 2**32):
        other = kept(n, n, p, seed, "cpu").double()
        assert abs(((keep - 1 + p) * (other - 1 + p)).mean()) < 5 * deviation**2 / n
    neighbours = (keep[1:] - 1 + p) * (keep[:-1] - 1 + p)
    assert abs(neighbours.mean()) < 5 * deviation**2 / n


def test_what_is_kept_is_divided_and_so_is_its_gradient():
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    y = ops.dropout(x, 0.25, 5)
    factor = kept(6, 8, 0.25, 5, "cpu").view(2, 3, 8) / 0.75
    assert 0 < factor.count_nonzero() < 48
    torch.testing.assert_close(y, x * factor)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], factor.double())
    assert torch.equal(ops.dropout(x, 0.25, 5), y) and not torch.equal(ops.dropout(x, 0.25, 6), y)
    assert ops.dropout(x, 0.0) is x
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.25, torch.tensor(5)), x)


def test_bfloat16_is_rounded_once():
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    y = ops.dropout(x, 0.05, 5)
    assert y.dtype == torch.bfloat16 and set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.95).bfloat16().item()}


def test_a_seed_is_drawn_from_torchs_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = ops.dropout_seed(), ops.dropout_seed()
    torch.set_rng_state(state)
    assert ops.dropout_seed() == first != second and first.dtype == torch.int64 and first.device.type == "cpu"


def test_bad_input():
    x = torch.ones(2, 2)
    for p in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"dropout: a probability in \[0, 1\), not"):
            ops.dropout(x, p, 1)
    with pytest.raises(ValueError, match=r"dropout 0.5 without a seed: pass seed=dropout_seed\(\)"):
        ops.dropout(x, 0.5)
    factors = torch.ones(1, 2), torch.ones(2, 1)
    with pytest.raises(ValueError, match="without a seed"):
        ops.lora(x, x, *factors, 1.0, 0.5)
    with pytest.raises(ValueError, match="a probability"):
        ops.lora_linear(x, x, None, *factors, 1.0, 1.5, 7)
