"""`ops.attention`: both implementations against a loop in float64 that follows the formula one query at a time."""

import math

import pytest
import torch

from minillm.ops import attention, attention_weights, causal_mask, use_backend

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}  # outputs are means of N(0, 1) values


def by_hand(q, k, v, mask=None, causal=False, bias=None, scale=None):
    """softmax(scale q.k + bias) v for each query alone, over the keys that it may see, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    out = torch.zeros(B, H, T, v.shape[-1], dtype=torch.float64)
    everything = torch.ones(B, H, T, S, dtype=torch.bool)
    mask = everything if mask is None else mask.expand_as(everything)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(S) if mask[b, h, t, s] and not (causal and s > t + S - T)]
                if not seen:
                    continue
                keys, values = k[b, h * G // H, seen], v[b, h * G // H, seen]
                scores = keys @ q[b, h, t] * (1 / math.sqrt(K) if scale is None else scale)
                if bias is not None:
                    scores = scores + bias.double().expand(B, H, T, S)[b, h, t, seen]
                exponentials = (scores - scores.max()).exp()
                out[b, h, t] = exponentials @ values / exponentials.sum()
    return out


def random_case(B, H, G, T, S, K=5, dtype=torch.float32):
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, S, G, K), torch.randn(B, S, G, K)
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]  # strided, as a model makes them


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 4, 2, 3, 5), (1, 6, 1, 5, 3), (2, 4, 4, 9, 9), (3, 4, 2, 1, 7), (1, 2, 2, 17, 18)]
)
def test_matches_the_formula(backend, dtype, causal, shape):
    q, k, v = random_case(*shape, dtype=dtype)
    with use_backend(backend):
        y = attention(q, k, v, causal=causal)
    torch.testing.assert_close(y.double(), by_hand(q, k, v, causal=causal), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_mask_bias_scale_and_rows_that_see_nothing(backend, causal):
    q, k, v = random_case(2, 4, 2, 5, 7)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[1, :, 2] = False
    bias = torch.randn(1, 4, 5, 7)
    with use_backend(backend):
        y = attention(q, k, v, mask=mask, causal=causal, bias=bias, scale=0.3)
    torch.testing.assert_close(
        y.double(), by_hand(q, k, v, mask, causal, bias, scale=0.3), rtol=0, atol=TOLERANCE[torch.float32]
    )
    assert (y[1, :, 2] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_implementations_agree(causal, masked):
    gradients = []
    case = random_case(2, 4, 2, 6, 6, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6) > 0.3 if masked else None
    if masked:
        mask[0, :, 3] = False
    weight = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for backend in ("reference", "torch"):
        inputs = [x.detach().requires_grad_() for x in case]
        with use_backend(backend):
            y = attention(*inputs, mask=mask, causal=causal)
        gradients.append(torch.autograd.grad((y * weight).sum(), inputs))
    for reference, fast in zip(*gradients, strict=True):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, reference, rtol=0, atol=1e-12)


def test_weights_sum_to_one_and_reproduce_the_output():
    q, k, v = random_case(2, 4, 2, 5, 7, dtype=torch.float64)
    weights = attention_weights(q, k, causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert (weights[..., 0, 3:] == 0).all()  # query 0 of 5 stands at key 2 of 7
    torch.testing.assert_close(weights @ v.repeat_interleave(2, dim=1), attention(q, k, v, causal=True))


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    """Each of 500 outputs is the mean of 400 draws of 0 (25 %) or 4/3, whose variance is 1/3."""
    q, k, v = torch.zeros(1, 1, 500, 4), torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 1)
    spread = math.sqrt(1 / 3 / 400)
    for backend in ("reference", "torch"):
        with use_backend(backend):
            y = attention(q, k, v, dropout=0.25)
        assert y.mean().item() == pytest.approx(1.0, abs=5 * spread / math.sqrt(500))
        assert y.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * 500))  # five standard errors


def test_causal_mask_aligns_the_newest_query_with_the_newest_key():
    expected = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_mask(2, 4), expected)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 6), (5, 5), (3, 7), (7, 7)])
def test_a_window_is_the_newest_keys_up_to_ones_own(window, lengths):
    queries, keys = lengths
    given = causal_mask(queries, keys, window=window)
    for i in range(queries):
        own = keys - queries + i
        for j in range(keys):
            assert given[i, j].item() == (j <= own and (window == 0 or own - j < window)), (i, j)
