"""Group-wise 4-bit whole numbers: by hand, by brute force in float64, and where a group has no spread."""

import math

import pytest
import torch

from minillm.ops.int4 import quantize_int4
from minillm.ops.quantize import CHUNK


def codes_of(q):
    return torch.stack([q.codes >> 4, q.codes & 15], -1).view(q.shape)


def test_hand_computed_codes_zeros_and_bytes():
    """0, 1, .. 15 has steps of 1 and its zero at 0; -3, .. 12 is the same with the zero at 3; (-1, 2): 3/15 = 0.2."""
    row = torch.arange(16.0)
    q = quantize_int4(torch.stack([row, row - 3]), group=16)
    assert q.codes[0].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert torch.equal(q.codes[1], q.codes[0])
    assert q.scale.tolist() == [[1.0], [1.0]] and q.zero.tolist() == [[0.0], [3.0]]
    assert torch.equal(q.dequantize(), torch.stack([row, row - 3]))
    q = quantize_int4(torch.tensor([[-1.0, 2.0, 0.09, 0.11]]), group=4)
    torch.testing.assert_close(q.zero.item(), 5.0)
    assert codes_of(q).tolist() == [[0, 15, 5, 6]]


@pytest.mark.parametrize("dout, din, group", [(1, 2, 2), (7, 12, 4), (3, 30, 6), (5, 64, 32), (4, 32, 32)])
def test_codes_and_values_against_brute_force(dout, din, group):
    weight = torch.randn(dout, din) * torch.rand(dout, 1) + torch.randn(dout, 1)
    q = quantize_int4(weight, group=group)
    assert q.scale.shape == q.zero.shape == (dout, din // group) and q.group == group
    rows = weight.double().view(-1, group)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    levels = low[..., None] + (high - low)[..., None] * torch.arange(16, dtype=torch.float64) / 15  # (groups, 1, 16)
    nearest = (rows[..., None] - levels).abs().argmin(-1)
    assert torch.equal(codes_of(q).view(-1, group), nearest.to(torch.uint8))
    values = levels.expand(-1, group, 16).gather(2, nearest[..., None])[..., 0].view(dout, din)
    torch.testing.assert_close(q.dequantize(torch.float64), values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.dequantize().double(), values, rtol=1e-6, atol=1e-6)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_more_than_one_chunk():
    weight = torch.randn(CHUNK // 512 + 3, 1024)
    q = quantize_int4(weight, group=32)
    for rows in (slice(0, 2), slice(CHUNK // 1024 - 1, CHUNK // 1024 + 1), slice(-2, None)):  # about the chunks' ends
        assert torch.equal(q.dequantize()[rows], quantize_int4(weight[rows], group=32).dequantize())
    assert (q.dequantize() - weight).abs().max() <= q.scale.max() / 2 * 1.0001


@pytest.mark.parametrize("value", [1.0, -0.3, 7e4, 3e-20, 0.0])
def test_a_group_without_spread_keeps_its_value(value):
    """(max - min) / 15 would be 0 there, and the zero -min / 0."""
    weight = torch.full((2, 4), value)
    q = quantize_int4(weight, group=4)
    assert (q.scale > 0).all() and q.zero.isfinite().all()
    torch.testing.assert_close(q.dequantize(), weight, rtol=1e-6, atol=0)


def test_a_group_with_hardly_any_spread_keeps_its_values():
    """One step of float32: the zero is then near 1e8, and the product still right to the last place."""
    weight = torch.ones(1, 4)
    weight[0, 2] += 2.0**-23
    torch.testing.assert_close(quantize_int4(weight, group=4).dequantize(), weight, rtol=2.0**-22, atol=0)


def test_zeros_are_real_numbers():
    """Rounded to whole numbers, as in GPTQ's files, zero = 0.5 would move every value of the group by half a step."""
    q = quantize_int4(torch.arange(16.0)[None] - 0.5, group=16)
    assert q.zero.item() == 0.5 and torch.equal(q.dequantize(), torch.arange(16.0)[None] - 0.5)


def test_bits_per_weight():
    """4 + 32/32 for the scales + 32/32 for the zeros."""
    q = quantize_int4(torch.randn(64, 128), group=32)
    assert 8 * (q.codes.nbytes + q.scale.nbytes + q.zero.nbytes) == 6 * 64 * 128


def test_bad_input():
    for shape in ((4, 10), (4,), (2, 2, 4)):
        with pytest.raises(ValueError, match=r"groups of 4 inputs need a matrix \(Dout, Din\) with Din a multiple"):
            quantize_int4(torch.randn(shape), group=4)
    with pytest.raises(ValueError, match="group: an even whole number above 0"):
        quantize_int4(torch.randn(4, 9), group=3)
    with pytest.raises(ValueError, match="only floating-point weights"):
        quantize_int4(torch.zeros(4, 4, dtype=torch.int64), group=4)
    for bad in (math.nan, math.inf):
        weight = torch.randn(4, 8)
        weight[2, 5] = bad
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            quantize_int4(weight, group=4)
