"""rope, rms_norm, layer_norm and swiglu: each against formulas in float64, and the fast implementations' gradients."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from minillm.ops import RopeScaling, layer_norm, rms_norm, rope, rotary_table, swiglu, use_backend

BACKENDS = ["reference", "torch"]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x):
    """The same numbers, every other one in memory."""
    return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]


def with_gradients(function, *inputs):
    """The output and the gradients for a fixed random output gradient."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, random(*y.shape, dtype=y.dtype, seed=9))


# --- rms_norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 5), (2, 3, 4), (0, 4)])
def test_rms_norm_is_that_of_torch(backend, shape):
    x, weight = random(*shape), random(shape[-1], seed=1)
    with use_backend(backend):
        ours = with_gradients(lambda x, w: rms_norm(x, w, 1e-3), x, weight)
        with torch.no_grad():
            torch.testing.assert_close(rms_norm(x, weight, 1e-3), ours[0])
            low = rms_norm(x.float(), weight.float(), 1e-3)  # float32 without gradients is a library call
            torch.testing.assert_close(low, ours[0].detach().float())
    theirs = with_gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-3), x, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["x", "weight", "both"])
def test_rms_norm_gradcheck(backend, trained):
    x = strided(random(2, 3, 5)).requires_grad_(trained != "weight")
    weight = random(5, seed=1).requires_grad_(trained != "x")
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_a_zero_vector_is_zero_with_a_finite_gradient(backend):
    with use_backend(backend):
        y, (grad, _) = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), torch.zeros(1, 4), torch.ones(4))
    assert y.count_nonzero() == 0
    torch.testing.assert_close(grad, 1e3 * random(1, 4, dtype=torch.float32, seed=9))  # 1 / sqrt(eps) times dL/dy


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_in_bfloat16_rounds_as_the_definition(weight_dtype):
    """Normalised in float32, rounded, then weighted; the result has the wider of the two dtypes."""
    x, weight = 100 * random(64, 32, dtype=torch.bfloat16), random(32, dtype=weight_dtype, seed=1)
    with use_backend("reference"):
        expected, expected_grads = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    ours, grads = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    assert ours.dtype == expected.dtype == weight_dtype
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)  # float32 sums in another order: one rounding off
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=2**-7, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= 0.01 * theirs.double().norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_half_precision_does_not_overflow(backend):
    """300^2 is no float16, yet the mean square of 300s is 300^2."""
    with use_backend(backend):
        y = rms_norm(torch.full((1, 8), 300.0, dtype=torch.float16), torch.ones(8, dtype=torch.float16), 1e-6)
    assert y.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_backward_stays_float32_under_autocast(backend):
    x, weight = random(6, 5, dtype=torch.float32), random(5, dtype=torch.float32, seed=1)
    expected = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    torch.testing.assert_close(ours, expected)


# --- layer_norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
def test_layer_norm_is_that_of_torch(backend, with_bias, shape):
    x, weight = random(*shape), random(shape[-1], seed=1)
    bias = [random(shape[-1], seed=2)] if with_bias else []
    with use_backend(backend):
        ours = with_gradients(lambda x, w, *b: layer_norm(x, w, *(b or [None]), 1e-3), x, weight, *bias)
    theirs = with_gradients(lambda x, w, *b: F.layer_norm(x, w.shape, w, *(b or [None]), 1e-3), x, weight, *bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# --- swiglu -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 33)])
def test_swiglu_is_its_formula(backend, shape):
    gate, up = 3 * random(*shape), random(*shape, seed=1)
    with use_backend(backend):
        ours = with_gradients(swiglu, gate, up)
        torch.testing.assert_close(with_gradients(swiglu, strided(gate), strided(up)), ours)
        with torch.no_grad():
            torch.testing.assert_close(swiglu(gate, up), ours[0])
    theirs = with_gradients(lambda gate, up: gate / (1 + torch.exp(-gate)) * up, gate, up)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_gradcheck(backend):
    gate, up = random(3, 5).requires_grad_(), strided(random(3, 5, seed=1)).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(swiglu, (gate, up))
        assert torch.autograd.gradcheck(lambda gate: swiglu(gate, up.detach()), (gate,))


@pytest.mark.parametrize("gate_dtype, up_dtype", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_swiglu_in_mixed_precision_agrees_with_the_definition(gate_dtype, up_dtype):
    gate, up = random(4, 33, dtype=getattr(torch, gate_dtype)), random(4, 33, dtype=getattr(torch, up_dtype), seed=1)
    with use_backend("reference"):
        expected, expected_grads = with_gradients(swiglu, gate, up)
    ours, grads = with_gradients(swiglu, gate, up)
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(grads, expected_grads, rtol=2**-6, atol=1e-2)


def test_swiglu_keeps_its_two_inputs_and_nothing_else():
    saved = []
    gate, up = random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate, up)
    assert {x.data_ptr() for x in saved} == {gate.data_ptr(), up.data_ptr()}


# --- rope -------------------------------------------------------------------------------------------------------------


def turned_by_hand(x, positions, theta):
    """Each pair (x[i], x[i + K/2]) as a complex number times exp(i * position * theta^(-2i/K))."""
    half = x.shape[-1] // 2
    angles = positions[..., None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = angles if positions.dim() == 1 else angles[:, None]  # (B, 1, T, K/2)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([y.real, y.imag], dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b, h, t, k", [(1, 1, 1, 2), (2, 3, 5, 6), (3, 1, 4, 8)])
@pytest.mark.parametrize("own_positions", [False, True])
def test_rope_turns_pairs_by_their_position(backend, b, h, t, k, own_positions):
    x = random(b, h, t, k)
    positions = torch.arange(t) + torch.arange(b)[:, None] * 7 if own_positions else torch.arange(t) + 3
    cos, sin = rotary_table(positions, k, theta=100.0)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2), strided(x)):
        with use_backend(backend):
            ours = with_gradients(lambda x: rope(x, cos, sin), layout)
        theirs = with_gradients(lambda x: turned_by_hand(x, positions, 100.0), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the table is float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_gradcheck(backend):
    cos, sin = (table.double() for table in rotary_table(torch.arange(3), 4))
    x = random(2, 2, 3, 4).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_leaves_position_zero_and_lengths_alone_and_its_input_unchanged(backend):
    x = random(2, 3, 4, 8)
    before = x.clone()
    with use_backend(backend):
        y = rope(x, *rotary_table(torch.arange(4), 8))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_queries_and_keys_depend_on_the_distance_only(backend):
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)
    with use_backend(backend):
        near = rope(q, *rotary_table(torch.tensor([5]), 8)) @ rope(k, *rotary_table(torch.tensor([2]), 8)).mT
        far = rope(q, *rotary_table(torch.tensor([105]), 8)) @ rope(k, *rotary_table(torch.tensor([102]), 8)).mT
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_in_bfloat16_rounds_once(backend):
    x, positions = random(2, 3, 40, 8, dtype=torch.bfloat16), torch.arange(40)
    with use_backend(backend):
        y, (grad,) = with_gradients(lambda x: rope(x, *rotary_table(positions, 8)), x)
    exact = turned_by_hand(x.double(), positions, 10000.0)
    assert y.dtype == grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)  # half a unit in the last of 8 bits


@pytest.mark.parametrize("positions", [torch.tensor([0, 1, 5]), torch.tensor([[0, 1], [7, 9]])])
def test_rotary_table_is_cosine_and_sine_of_its_angles(positions):
    """K = 4, theta = 10000: frequencies 10000^0 = 1 and 10000^(-2/4) = 1/100."""
    cos, sin = rotary_table(positions, 4)
    angles = torch.stack([positions.double(), positions.double() / 100], dim=-1)
    torch.testing.assert_close(cos.double(), torch.cat([angles.cos()] * 2, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin.double(), torch.cat([-angles.sin(), angles.sin()], -1), rtol=1e-6, atol=1e-6)


def test_rotary_table_refuses_an_odd_head():
    with pytest.raises(ValueError, match="pairs of features: head_dim must be even, not 7"):
        rotary_table(torch.arange(3), 7)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("theta, original", [(10000.0, 64), (500000.0, 8192), (100.0, 128)])
def test_scaled_frequencies_are_those_of_transformers(kind, theta, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = {"rope_type": kind, "rope_theta": theta, "factor": 6.0}
    if kind == "llama3":
        theirs |= {"low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": original}
    config = LlamaConfig(head_dim=64, max_position_embeddings=8 * original, rope_parameters=theirs)
    expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    plain = theta ** (-torch.arange(32) / 32)
    scaling = RopeScaling(kind, 6.0, 1.5, 5.0, original)
    torch.testing.assert_close(scaling.apply(plain), expected, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 7])
    cos, _ = rotary_table(positions, 64, theta, scaling)
    torch.testing.assert_close(cos[:, :32], (positions[:, None] * expected).cos(), rtol=0, atol=1e-5)
    assert scale == 1.0
    if kind == "llama3":  # short, middling and long waves are all among them
        turns = original * plain / (2 * math.pi)
        for band in (turns > 5, (turns > 1.5) & (turns < 5), turns < 1.5):
            assert band.any()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="yarn"), "kind='yarn': rope scaling is linear or llama3"),
        (dict(factor=0.5), "factor=0.5 must be at least 1"),
        (dict(factor=math.nan), "factor=nan must be at least 1"),
        (dict(low_freq_factor=4.0), "low_freq_factor=4.0 above 0 and below high_freq_factor=4.0"),
        (dict(low_freq_factor=0.0), "low_freq_factor=0.0 above 0"),
        (dict(original_max_positions=0), "original_max_positions=0 must be at least 1"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(fields, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse some before
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
