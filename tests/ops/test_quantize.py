"""NF4: the published code book, codes by brute force in float64, sizes in bytes, and what must stay small meanwhile."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.ops import quantize_int4
from minillm.ops.quantize import CHUNK, INT8, NF4, QuantTensor, check_size, quantize_nf4, unpack

PUBLISHED = (  # in the appendix of the paper, and in bitsandbytes
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MANTISSA = 2.0**-23  # of float32


def codes_of(q: QuantTensor) -> list[int]:
    return [code for byte in q.codes.flatten().tolist() for code in (byte >> 4, byte & 15)]


def held(q: QuantTensor) -> int:
    """Bytes, without the code books, which are of one size for all weights."""
    return sum(t.nbytes for leaf, t in q._asdict().items() if isinstance(t, Tensor) and not leaf.startswith("book"))


def by_hand(weight: Tensor, block: int) -> tuple[list[int], list[float]]:
    """Codes and scales in float64: for each number the nearest of the published values, by trying all."""
    flat = weight.double().flatten().tolist()
    scales = [max(map(abs, flat[i : i + block])) for i in range(0, len(flat), block)]
    book = torch.tensor(NF4, dtype=torch.float64)
    scaled = torch.tensor([x / (scales[i // block] or 1.0) for i, x in enumerate(flat)], dtype=torch.float64)
    return (scaled[:, None] - book).abs().argmin(1).tolist(), scales


def test_the_code_book_is_the_published_one():
    assert len(NF4) == 16 and list(NF4) == sorted(NF4)
    torch.testing.assert_close(torch.tensor(NF4), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    assert NF4[0] == -1.0 and NF4[7] == 0.0 and NF4[15] == 1.0


def test_the_steps_of_probability_are_equal_in_each_half():
    """The other way round, by torch's cumulative distribution: 8 equal steps above 0 and 7 below."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
    largest = normal.icdf(torch.tensor(0.9677083, dtype=torch.float64))
    steps = normal.cdf(torch.tensor(NF4, dtype=torch.float64) * largest).diff()
    expected = [(0.9677083 - 0.5) / 7] * 7 + [(0.9677083 - 0.5) / 8] * 8
    torch.testing.assert_close(steps, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_sixteen_equal_quantiles_are_not_nf4():
    """The common toy, Phi^-1((i + 1/2) / 16), has no 0: it would move every zero of a weight. NF4 keeps it."""
    toy = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(16) + 0.5) / 16)
    toy = toy / toy.max()
    assert 0.0 not in toy.tolist() and (toy - torch.tensor(PUBLISHED)).abs().max() > 0.04
    weight = torch.zeros(64)
    weight[1] = 3.0
    assert torch.equal(quantize_nf4(weight, double=False).dequantize(), weight)


def test_the_8_bit_code_by_hand():
    """127 positive values: the decade ending at 10^(i-6) has 2^i: for i = 0 only 0.55e-6, then 3.25e-6, 7.75e-6."""
    book = torch.tensor(INT8, dtype=torch.float64)
    assert len(INT8) == 256 == len(set(INT8)) and list(INT8) == sorted(INT8)
    positive = book[book > 0]
    torch.testing.assert_close(positive[:3], torch.tensor([0.55e-6, 3.25e-6, 7.75e-6], dtype=torch.float64))
    for i in range(7):
        inside = (positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))
        assert inside.sum() == 2**i
    assert INT8[0] == -(1 - 0.9 / 128) and INT8[-2:] == (1 - 0.9 / 128, 1.0) and 0.0 in INT8
    assert torch.equal(-positive[:-1].flip(0), book[book < 0])  # 1 alone has no negative


def test_hand_computed_codes_and_bytes():
    """(0, 2, -2, 1) over 2: 0 -> 7, 1 -> 15, -1 -> 0, and 0.5 is below the middle 0.5017 of values 12 and 13."""
    q = quantize_nf4(torch.tensor([0.0, 2.0, -2.0, 1.0]), block=4, double=False)
    assert q.codes.tolist() == [[0x7F, 0x0C]] and q.absmax.tolist() == [2.0]
    torch.testing.assert_close(q.dequantize(), torch.tensor([0.0, 2.0, -2.0, 2 * 0.44070982933]))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape, block", [((1,), 64), ((7, 9), 4), ((3, 5, 2), 6), ((64, 3), 64), ((11, 13), 64)])
def test_codes_and_values_against_brute_force(shape, block, double):
    """Ragged last blocks and odd counts among them."""
    weight = torch.randn(shape) * torch.rand(shape)
    q = quantize_nf4(weight, block=block, double=double)
    codes, scales = by_hand(weight, block)
    assert codes_of(q)[: weight.numel()] == codes
    kept = q.scales().double()
    if not double:
        assert kept.tolist() == scales
    values = torch.tensor([NF4[code] * kept[i // block].item() for i, code in enumerate(codes)], dtype=torch.float64)
    torch.testing.assert_close(q.dequantize(torch.float64), values.view(shape), rtol=MANTISSA, atol=0)
    torch.testing.assert_close(q.dequantize().double(), values.view(shape), rtol=2 * MANTISSA, atol=0)
    assert q.dequantize().shape == weight.shape


def test_more_than_one_chunk():
    weight = torch.randn(3, CHUNK // 2 + 5)
    codes = codes_of(quantize_nf4(weight))
    flat = weight.flatten()
    for start in (0, CHUNK - 64, CHUNK, flat.numel() // 64 * 64):  # a whole block each, or the ragged end
        assert codes[start : start + 64][: len(flat) - start] == by_hand(flat[start : start + 64], 64)[0]
    error = (quantize_nf4(weight).dequantize() - weight).abs()
    assert error.max() <= weight.abs().max() * 0.16  # half the widest gap, -1 to -0.6962, and the scales' own rounding


def test_between_two_values_the_lower_is_taken():
    book = torch.tensor(NF4)
    middles = (book[1:] + book[:-1]) / 2
    q = quantize_nf4(torch.cat([middles, torch.ones(1)]), block=16, double=False)
    assert codes_of(q) == [*range(15), 15]


def test_a_block_is_its_scale_times_a_block():
    """Powers of two change scales only; a block does not see its neighbours."""
    weight = torch.randn(4, 64)
    factors = torch.tensor([1.0, 2.0**20, 2.0**-30, 0.0])[:, None]
    q, scaled = quantize_nf4(weight, double=False), quantize_nf4(weight * factors, double=False)
    assert torch.equal(scaled.codes[:3], q.codes[:3]) and torch.equal(scaled.absmax, q.absmax * factors[:, 0])
    assert torch.equal(scaled.dequantize()[3], torch.zeros(64))
    double = quantize_nf4(weight * factors)
    assert double.scales()[3] != 0  # the scale of the zeros is not exact, so their codes must be those of 0
    assert torch.equal(double.dequantize()[3], torch.zeros(64)) and set(double.codes[3].tolist()) == {0x77}


def test_double_quantization_by_hand():
    """scale = absmax2 * (nearest of INT8 to (absmax - mean) / absmax2) + mean, for each 256 blocks."""
    weight = torch.randn(300, 64) * torch.rand(300, 1)
    absmax = weight.abs().amax(1).double()
    mean = absmax.mean()
    centred = (absmax - mean).split(256)
    book = torch.tensor(INT8, dtype=torch.float64)
    expected = [c.abs().max() * book[(c[:, None] / c.abs().max() - book).abs().argmin(1)] + mean for c in centred]
    q = quantize_nf4(weight)
    assert q.absmax.dtype == torch.uint8 and len(q.absmax) == 300
    torch.testing.assert_close(q.absmax2.double(), torch.stack([c.abs().max() for c in centred]))
    torch.testing.assert_close(q.scales().double(), torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert (q.scales() - absmax).abs().max() < 0.01 * absmax.max()
    assert torch.equal(q.codes, quantize_nf4(weight, double=False).codes)


def test_equal_scales_are_exact():
    """All offsets from the mean are 0, and so is their own scale: nothing is divided by it."""
    weight = torch.cat([torch.tensor([2.0, -1.0]), torch.zeros(62)]).repeat(8)
    q = quantize_nf4(weight)
    assert torch.equal(q.scales(), torch.full((8,), 2.0)) and {INT8[code] for code in q.absmax.tolist()} == {0.0}


def test_bits_per_weight():
    """4 + 32/64, and 4 + 8/64 + 32/(64 * 256) with the 32 bits of one offset: from the bytes that are held."""
    weight = torch.randn(1024, 1024)
    assert 8 * held(quantize_nf4(weight, double=False)) / 2**20 == 4.5
    assert 8 * held(quantize_nf4(weight)) / 2**20 == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20
    assert math.isclose(8 * held(quantize_nf4(weight)) / 2**20, 4.127, abs_tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_as_the_numbers_they_are(dtype):
    weight = torch.randn(5, 32).to(dtype)
    q, wide = quantize_nf4(weight), quantize_nf4(weight.float())
    assert torch.equal(q.codes, wide.codes) and torch.equal(q.scales(), wide.scales())
    assert q.dequantize(dtype).dtype == dtype
    exact = q.dequantize(torch.float64)
    rounded = exact.to(torch.float32).to(dtype) if dtype != torch.float64 else exact
    assert torch.equal(q.dequantize(dtype), rounded)  # rounded once, from float32


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_scales_are_float32_whatever_the_default_dtype(default):
    weight = torch.randn(5, 32)
    expected = quantize_nf4(weight).dequantize(), quantize_int4(weight).dequantize()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(quantize_nf4(weight).dequantize(), expected[0])
        assert torch.equal(quantize_int4(weight).dequantize(), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_transposed_weight():
    weight = torch.randn(6, 10).t()
    assert torch.equal(quantize_nf4(weight).dequantize(), quantize_nf4(weight.contiguous()).dequantize())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that torch makes, views and those of `given` apart."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.nbytes)
        return made


def test_temporaries_do_not_grow_with_the_weight():
    weight = torch.randn(CHUNK // 16, 256).half()  # 16 chunks: in float32 it would be 16 times the allowed
    with Largest(weight) as seen:
        q = quantize_nf4(weight)
    assert CHUNK <= seen.bytes <= max(4 * CHUNK, q.codes.nbytes)
    with Largest(*(t for t in q if isinstance(t, Tensor))) as seen:
        q.dequantize(torch.float16)
    assert seen.bytes == weight.nbytes


def test_unpack_is_the_way_back():
    book = torch.stack([torch.arange(16.0).repeat_interleave(16), torch.arange(16.0).repeat(16)], 1)
    assert unpack(torch.tensor([[0x7F, 0x0C]], dtype=torch.uint8), book).tolist() == [[7.0, 15.0, 0.0, 12.0]]


@pytest.mark.parametrize("size", [0, -2, 3, True, 64.0, "64"])
def test_block_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=rf"block: an even whole number above 0 .*, not {size!r}"):
        check_size("block", size)
    if type(size) is int:
        with pytest.raises(ValueError, match="block: an even whole number"):
            quantize_nf4(torch.randn(8), block=size)


def test_what_is_no_weight():
    for weight in (torch.arange(4), torch.empty(0)):
        with pytest.raises(ValueError, match="only floating-point weights can be quantized, not torch"):
            quantize_nf4(weight)
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(200)
        weight[150] = bad
        for double in (False, True):
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                quantize_nf4(weight, double=double)
    with pytest.raises(ValueError, match="too large for float32"):
        quantize_nf4(torch.full((4,), 1e300, dtype=torch.float64))
