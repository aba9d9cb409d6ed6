"""Each layer against torch's own with the same weights, or against a formula worked by hand."""

import math

import pytest
import torch
from torch import nn

from minillm.layers import (
    MLP,
    Attention,
    Block,
    GatedMLP,
    KVCache,
    LayerNorm,
    LearnedPositions,
    MemoryCache,
    RelativePositions,
    RMSNorm,
    SinusoidalPositions,
)
from minillm.ops import rope, rotary_table

EXACT = dict(rtol=0, atol=1e-12)  # float64, a few dozen operations


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    for projection, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases, strict=True):
        projection.load_state_dict({"weight": weight, "bias": bias})
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double()


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (4, 7), (6, 2)])
def test_attention_equals_torch_multihead_attention(num_heads, lengths):
    T, S = lengths
    theirs = randomise(nn.MultiheadAttention(12, num_heads, batch_first=True))
    ours = Attention(12, num_heads, bias=True).double()
    copy_attention(ours, theirs)
    x, source = torch.randn(2, T, 12).double(), torch.randn(2, S, 12).double()
    keep = torch.ones(2, S, dtype=torch.bool)
    keep[1, -1] = S == 1
    expected, weights = theirs(x, source, source, key_padding_mask=~keep, average_attn_weights=False)
    mask = keep[:, None, None, :]
    torch.testing.assert_close(ours(x, source=source, mask=mask), expected, **EXACT)
    torch.testing.assert_close(ours.weights(x, source=source, mask=mask), weights, **EXACT)


def test_grouped_queries_are_attention_with_repeated_heads():
    grouped = randomise(Attention(12, 6, num_kv_heads=2, head_dim=3))
    full = Attention(12, 6, head_dim=3).double()
    full.load_state_dict(
        grouped.state_dict()
        | {
            f"{name}.weight": getattr(grouped, name).weight.view(2, 3, 12).repeat_interleave(3, 0).flatten(0, 1)
            for name in ("k_proj", "v_proj")
        }
    )
    x = torch.randn(2, 5, 12).double()
    torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True), **EXACT)


def test_a_prefix_in_the_cache_is_seen_by_all_and_shifts_nothing():
    layer = randomise(Attention(8, 2))
    x, prefix = torch.randn(1, 4, 8).double(), [torch.randn(1, 2, 3, 4).double() for _ in range(2)]
    rotation = rotary_table(torch.arange(4), 4)
    mask = torch.tensor([[[[True, False, True, True]]]])
    seen = torch.cat([torch.ones(1, 1, 4, 3, dtype=torch.bool), mask.expand(1, 1, 4, 4)], -1)
    bias = torch.randn(1, 2, 4, 4).double()
    weights = layer.weights(x, mask=mask, bias=bias, rotation=rotation, cache=KVCache(prefix=tuple(prefix)))
    assert torch.equal(weights > 0, seen.expand_as(weights))
    without = layer.weights(x, mask=mask, bias=bias, rotation=rotation)
    rescaled = weights[..., 3:] / weights[..., 3:].sum(-1, keepdim=True)  # softmax: a prefix only takes its share
    torch.testing.assert_close(rescaled, without, **EXACT)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_block_equals_torch(norm_first, activation):
    theirs = randomise(nn.TransformerEncoderLayer(12, 3, 20, 0.0, activation, norm_first=norm_first, batch_first=True))
    ours = Block(
        Attention(12, 3, bias=True), MLP(12, 20, activation), lambda: LayerNorm(12), norm_first=norm_first
    ).double()
    copy_attention(ours.self_attn, theirs.self_attn)
    pairs = [(ours.mlp.up_proj, theirs.linear1), (ours.mlp.down_proj, theirs.linear2)]
    pairs += [(ours.attn_norm, theirs.norm1), (ours.mlp_norm, theirs.norm2)]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    x = torch.randn(2, 7, 12).double()
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_block_with_cross_attention_equals_torch(norm_first):
    theirs = randomise(nn.TransformerDecoderLayer(12, 3, 20, 0.0, norm_first=norm_first, batch_first=True))
    ours = Block(
        Attention(12, 3, bias=True),
        MLP(12, 20, "relu"),
        lambda: LayerNorm(12),
        cross_attn=Attention(12, 3, bias=True),
        norm_first=norm_first,
    ).double()
    copy_attention(ours.self_attn, theirs.self_attn)
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    pairs = [(ours.mlp.up_proj, theirs.linear1), (ours.mlp.down_proj, theirs.linear2)]
    pairs += [(ours.attn_norm, theirs.norm1), (ours.cross_attn_norm, theirs.norm2), (ours.mlp_norm, theirs.norm3)]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 8, 12).double()
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0, 6:] = False
    future = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    expected = theirs(x, memory, tgt_mask=future, memory_key_padding_mask=~keep)
    given = ours(x, causal=True, memory=memory, memory_mask=keep[:, None, None, :])
    torch.testing.assert_close(given, expected, **EXACT)


def test_norms_equal_torch():
    x = torch.randn(3, 4, 7).double()
    for ours, theirs in ((RMSNorm(7, 1e-3), nn.RMSNorm(7, 1e-3)), (LayerNorm(7, 1e-3), nn.LayerNorm(7, 1e-3))):
        randomise(ours)
        theirs.double().load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gated_mlp_is_its_formula(activation):
    mlp = randomise(GatedMLP(6, 10, activation, bias=True))
    x = torch.randn(2, 3, 6).double()
    act = getattr(nn.functional, activation)
    hidden = act(x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias) * (x @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias, **EXACT)


@pytest.mark.parametrize("hidden_size", [6, 7])
def test_sinusoidal_positions_are_the_papers_table(hidden_size):
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos of the same angle."""
    given = SinusoidalPositions(hidden_size)(torch.tensor([[0, 3], [40, 1]]))
    for row, positions in enumerate([[0, 3], [40, 1]]):
        for column, position in enumerate(positions):
            for feature in range(hidden_size):
                angle = position / 10000 ** ((feature - feature % 2) / hidden_size)
                expected = math.cos(angle) if feature % 2 else math.sin(angle)
                assert given[row, column, feature].item() == pytest.approx(expected, abs=1e-5)


def t5_buckets(offsets, *, bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket(offsets, bidirectional, num_buckets, max_distance)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "num_buckets, max_distance", [(32, 128), (4, 8), (6, 5), (7, 20), (16, 1000), (64, 3000), (9, 128), (18, 128)]
)
def test_relative_buckets_are_those_of_t5(bidirectional, num_buckets, max_distance):
    """Rounding included: with 9 buckets on a side a logarithm in float64 would put three distances elsewhere."""
    layer = RelativePositions(num_buckets, max_distance, 1, bidirectional=bidirectional)
    offsets = torch.arange(-5000, 5001)[None]
    options = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    given = layer.buckets(offsets)
    assert torch.equal(given, t5_buckets(offsets, **options))
    highest = num_buckets // 2 * 2 if bidirectional else num_buckets  # an odd count leaves the last without a use
    unused = {num_buckets // 2} if bidirectional else set()  # a later key is at least one away
    assert set(given.flatten().tolist()) == set(range(highest)) - unused


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("lengths", [(6, 6), (1, 6), (2, 7)])
def test_relative_biases_are_of_the_newest_queries(bidirectional, lengths):
    (queries, keys), layer = lengths, RelativePositions(8, 20, 3, bidirectional=bidirectional)
    offsets = torch.arange(keys) - torch.arange(keys)[:, None]
    buckets = t5_buckets(offsets, bidirectional=bidirectional, num_buckets=8, max_distance=20)
    expected = layer.weight[buckets].permute(2, 0, 1)[None, :, -queries:]
    assert torch.equal(layer(queries, keys), expected)


@pytest.mark.parametrize(
    "num_buckets, max_distance, bidirectional, message",
    [
        (3, 8, True, "num_buckets=3 must be at least 4"),
        (1, 8, False, "num_buckets=1 must be at least 2"),
        (32, 16, False, "max_distance=16 more than the 16 distances that have a bucket each"),
        (32, 8, True, "max_distance=8 more than the 8 distances"),
    ],
)
def test_buckets_that_hold_no_distance_are_refused(num_buckets, max_distance, bidirectional, message):
    with pytest.raises(ValueError, match=message):
        RelativePositions(num_buckets, max_distance, 2, bidirectional=bidirectional)


def test_learned_positions_pick_rows():
    layer = LearnedPositions(5, 3)
    assert torch.equal(layer(torch.tensor([[4, 0]])), layer.weight[[4, 0]][None])
    assert list(layer.state_dict()) == ["weight"]


def test_dropout_acts_on_each_sublayer_only_in_training():
    block = Block(Attention(8, 2), GatedMLP(8, 16), lambda: RMSNorm(8), dropout=0.5)
    x = torch.randn(1, 4, 8)
    block.train()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_normalised_queries_and_keys_by_hand(norm, scale):
    """Each head's q and k pass a norm over their K features, before they turn; Qwen 3's order."""
    layer = randomise(Attention(12, 3, num_kv_heads=1, qk_norm=norm, scale=scale))
    x, rotation = torch.randn(2, 5, 12).double(), rotary_table(torch.arange(5), 4)
    q = layer.q_norm((x @ layer.q_proj.weight.T).view(2, 5, 3, 4)).transpose(1, 2)
    k = layer.k_norm((x @ layer.k_proj.weight.T).view(2, 5, 1, 4)).transpose(1, 2)
    v = (x @ layer.v_proj.weight.T)[:, None]
    scores = rope(q, *rotation) @ rope(k, *rotation).mT * (scale or 0.5)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, rotation=rotation), expected, **EXACT)
    torch.testing.assert_close(layer.weights(x, rotation=rotation), scores.softmax(-1), **EXACT)


@pytest.mark.parametrize("bias, with_bias", [(False, ""), (True, "qkvo"), ("qkv", "qkv")])
def test_which_projections_have_a_bias(bias, with_bias):
    names = {name for name, _ in Attention(8, 2, bias=bias).named_parameters() if name.endswith("bias")}
    assert names == {f"{letter}_proj.bias" for letter in with_bias}


def test_a_filled_memory_stands_for_source_and_mask():
    layer = randomise(Attention(8, 2, num_kv_heads=1, bias=True))
    x, source, mask = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double(), torch.rand(2, 1, 1, 5) > 0.4
    expected, memory = layer(x, source=source, mask=mask), MemoryCache()
    torch.testing.assert_close(layer(x, source=source, mask=mask, cache=memory), expected, **EXACT)
    for t in range(3):
        torch.testing.assert_close(layer(x[:, t : t + 1], cache=memory), expected[:, t : t + 1], **EXACT)
    torch.testing.assert_close(layer.weights(x, cache=memory), layer.weights(x, source=source, mask=mask), **EXACT)


@pytest.mark.parametrize("keys", [4, 6])
def test_masks_and_biases_of_another_length_are_refused(keys):
    layer, x, cache = Attention(8, 2), torch.randn(1, 3, 8), KVCache()
    cache.update(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4))
    mask, bias = torch.ones(1, 1, 3, keys, dtype=torch.bool), torch.zeros(1, 1, 3, keys)
    for cached in (cache, MemoryCache()):
        source = None if cached is cache else torch.randn(1, 5, 8)
        with pytest.raises(ValueError, match=f"mask speaks of {keys} keys, but there are 5, cached ones included"):
            layer(x, source=source, mask=mask, cache=cached)
        with pytest.raises(ValueError, match=f"bias speaks of {keys} keys, but there are 5"):
            layer(x, source=source, bias=bias, cache=cached)
    assert cache.offset == 2  # nothing was kept


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="hidden_size=10 must be a multiple of num_heads=3; or give head_dim"):
        Attention(10, 3)
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        Attention(12, 4, num_kv_heads=3)
