"""Looking into encoders, encoder-decoders and models with a head on top."""

import math

import pytest
import torch

from minillm.layers import KVCache
from minillm.models import HeadConfig, ModelConfig, attention_maps, build, build_with_head, count_parameters

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_positions": 32}


@pytest.fixture
def translator():
    return build(ModelConfig(**SIZES, kind="encoder_decoder", num_decoder_layers=3, positions="sinusoidal"))


@pytest.fixture
def source():
    return torch.randint(61, (2, 7))


@pytest.fixture
def target():
    return torch.randint(61, (2, 5))


def by_hand(attention, queries, keys):
    """softmax(q k^T / sqrt(K)), from the projections themselves."""
    q, k = (
        projection(x).unflatten(-1, (4, 6)).transpose(1, 2)
        for projection, x in ((attention.q_proj, queries), (attention.k_proj, keys))
    )
    return (q @ k.mT / math.sqrt(6)).softmax(-1)


def test_an_encoder_s_maps_see_both_ways(source):
    encoder = build(ModelConfig(**SIZES, kind="encoder", positions="sinusoidal"))
    maps = attention_maps(encoder, source)
    layer = encoder.layers[0]
    x = layer.attn_norm(encoder.embed_tokens(source) * math.sqrt(24) + encoder.embed_positions(torch.arange(7)))
    assert len(maps) == 2 and maps[0].shape == (2, 4, 7, 7)
    torch.testing.assert_close(maps[0], by_hand(layer.self_attn, x, x))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    assert (attention_maps(encoder, source, mask=mask)[1][1, :, :, 4:] == 0).all()


def test_the_three_attentions_of_an_encoder_decoder(translator, source, target):
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    translator.train()
    reading, writing, crossing = (
        attention_maps(translator, source, target, source_mask=mask, **options)
        for options in ({"stack": "encoder"}, {}, {"kind": "cross_attn"})
    )
    assert translator.training
    assert [maps[0].shape for maps in (reading, writing, crossing)] == [(2, 4, 7, 7), (2, 4, 5, 5), (2, 4, 5, 7)]
    assert [len(maps) for maps in (reading, writing, crossing)] == [2, 3, 3]
    for here, alone in zip(reading, attention_maps(translator.encoder, source, mask=mask), strict=True):
        torch.testing.assert_close(here, alone)
    assert (writing[0].triu(1) == 0).all() and (crossing[2][1, :, :, 4:] == 0).all()
    seen = []
    layer = translator.decoder.layers[0]
    hook = layer.cross_attn_norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    memory = translator.eval().encode(source, mask)
    translator(source, target, source_mask=mask)
    hook.remove()
    torch.testing.assert_close(crossing[0][0], by_hand(layer.cross_attn, seen[0], memory)[0])


def test_maps_below_a_head(source):
    classifier = build_with_head(ModelConfig(**SIZES, kind="encoder"), HeadConfig())
    for ours, body in zip(attention_maps(classifier, source), attention_maps(classifier.body, source), strict=True):
        torch.testing.assert_close(ours, body)


def test_maps_that_do_not_exist_are_refused(translator, tiny_decoder, source, target):
    with pytest.raises(ValueError, match="this Decoder has no cross_attn in its layers"):
        attention_maps(tiny_decoder, source, kind="cross_attn")
    with pytest.raises(ValueError, match="kind='cross': did you mean cross_attn"):
        attention_maps(translator, source, target, kind="cross")
    with pytest.raises(ValueError, match="stack='encoder': this Decoder has only one stack: leave stack out"):
        attention_maps(tiny_decoder, source, stack="encoder")
    with pytest.raises(ValueError, match="has no cross_attn in its encoder"):
        attention_maps(translator, source, target, kind="cross_attn", stack="encoder")


def test_a_cache_is_refused(tiny_decoder, source):
    """The weights are asked for beside the forward pass: both would put the same keys into it."""
    with pytest.raises(ValueError, match="leave cache out, which would be filled twice"):
        attention_maps(tiny_decoder, source, cache=[KVCache() for _ in tiny_decoder.layers])


def test_parameters_of_an_encoder_decoder_by_part(translator):
    """D=24, F=64, V=61: attention 4*24*24 in 2 + 3 + 3 places; mlp 3*24*64 in 5; norms 2*2 + 3*3 + 2 of 24."""
    by_hand = {"embedding": 1464, "attention": 8 * 2304, "mlp": 5 * 4608, "norms": 15 * 24, "head": 0, "other": 0}
    assert count_parameters(translator) == by_hand | {"total": sum(by_hand.values())}
    relative = build(ModelConfig(**SIZES, kind="encoder_decoder", positions="relative", tie_embeddings=False))
    counts = count_parameters(relative)
    assert counts["head"] == counts["embedding"] == 1464
    assert counts["attention"] == 6 * 2304 + 2 * 32 * 4  # two tables of 32 buckets for 4 heads


@pytest.mark.parametrize(
    "task, head",
    [
        ("classification", 24 * 25 + 3 * 25),  # a dense layer and a classifier of 3, each with bias
        ("tagging", 3 * 25),
        ("masked_lm", 24 * 25 + 24 + 61),  # a dense layer, a norm, and the tied head's bias
        ("embedding", 24 * 25),
    ],
)
def test_all_that_is_not_the_body_is_head(task, head):
    config = ModelConfig(**SIZES, kind="encoder", positions="learned", token_types=2)
    headed = build_with_head(config, HeadConfig(task=task, num_labels=3))
    body = count_parameters(build(config))
    assert body["embedding"] == (61 + 32 + 2) * 24 and body["head"] == body["other"] == 0
    assert count_parameters(headed) == body | {"head": head, "total": body["total"] + head}
