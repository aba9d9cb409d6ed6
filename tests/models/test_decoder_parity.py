"""Our decoder equals transformers' LlamaForCausalLM with the same weights: logits, gradients, cache, padding."""

import pytest
import torch
import torch.nn.functional as F

from minillm.layers import KVCache, StaticKVCache
from minillm.ops import use_backend

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the largest logit


def assert_equal(ours, theirs, dtype):
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=RELATIVE[dtype] * max(scale, 1e-30))


def left_padded(tokens: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fields",
    [
        dict(num_kv_heads=1),
        dict(num_kv_heads=2),
        dict(num_kv_heads=4),
        dict(num_kv_heads=2, head_dim=10, intermediate_size=33, vocab_size=7),
        dict(attention_bias=True, mlp_bias=True, tie_embeddings=False, rope_theta=500.0),
    ],
)
def test_logits_and_all_gradients(llama_twins, hf_name, backend, dtype, fields):
    ours, theirs = llama_twins(dtype, **fields)
    tokens = torch.randint(0, ours.config.vocab_size, (3, 13))
    with use_backend(backend):
        logits = ours(tokens)
    expected = theirs(tokens).logits
    assert_equal(logits, expected, dtype)
    for output in (logits, expected):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {hf_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert_equal(gradients.pop(name), parameter.grad, dtype)
    assert not gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_padding_on_either_side(llama_twins, dtype, side, num_kv_heads):
    ours, theirs = llama_twins(dtype, num_kv_heads=num_kv_heads)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]], dtype=torch.bool)
    mask = mask if side == "left" else mask.flip(1)
    tokens = torch.randint(1, 61, mask.shape).masked_fill(~mask, 0)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert_equal(ours(tokens, mask=mask)[mask], expected[mask], dtype)
    alone = ours(tokens[1][mask[1]][None])  # the padded row says what it says alone
    assert_equal(ours(tokens, mask=mask)[1][mask[1]], alone[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [6, 1, 4, 2], [12, 1]])
def test_cache_changes_nothing(llama_twins, dtype, cache_class, num_kv_heads, pieces):
    ours, theirs = llama_twins(dtype, num_kv_heads=num_kv_heads)
    config = ours.config
    tokens, mask = left_padded(torch.randint(1, 61, (2, 13)), [13, 8])
    if cache_class == "static":
        cache = [StaticKVCache(2, config.num_kv_heads, 20, config.head_dim, dtype) for _ in ours.layers]
    else:
        cache = [KVCache() for _ in ours.layers]
    outputs, end = [], 0
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            end += piece.shape[1]
            outputs.append(ours(piece, mask=mask[:, :end], cache=cache))
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert cache[0].offset == 13
    assert_equal(torch.cat(outputs, dim=1)[mask], expected[mask], dtype)


def test_batch_of_one_and_non_contiguous_tokens(llama_twins):
    ours, theirs = llama_twins()
    tokens = torch.randint(0, 61, (7, 2)).t()[:1]
    assert_equal(ours(tokens), theirs(tokens).logits, torch.float32)
    assert_equal(ours(tokens[:, :1]), theirs(tokens[:, :1]).logits, torch.float32)
