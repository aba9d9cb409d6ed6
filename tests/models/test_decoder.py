"""The decoder's own promises: its doors, its start, its limits."""

import math

import pytest
import torch

from minillm.layers import KVCache
from minillm.models import ModelConfig, attention_maps, build, count_parameters

SIZES = dict(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, max_positions=16)


def test_embeds_are_the_same_door_as_tokens(tiny_decoder, tokens):
    torch.testing.assert_close(tiny_decoder(embeds=tiny_decoder.embed_tokens(tokens)), tiny_decoder(tokens))
    torch.testing.assert_close(tiny_decoder.lm_head(tiny_decoder.hidden(tokens)), tiny_decoder(tokens))
    for wrong in ({}, {"tokens": tokens, "embeds": torch.zeros(3, 11, 24)}):
        with pytest.raises(ValueError, match="give either tokens or embeds"):
            tiny_decoder(**wrong)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "relative"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_variant_is_causal_and_caches(positions, tied):
    fields = dict(positions=positions, tie_embeddings=tied, norm="layer", mlp="plain", activation="gelu", mlp_bias=True)
    model = build(ModelConfig(**SIZES, **fields)).eval()
    tokens = torch.randint(0, 61, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])
    cache = [KVCache() for _ in model.layers]
    pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=0, atol=1e-6)


def test_order_matters_only_through_positions():
    """In one layer without positions, what the last token reads is a set: swapping two earlier ones changes nothing."""
    model = build(ModelConfig(**SIZES | {"num_layers": 1})).eval()
    tokens = torch.tensor([[5, 9, 7]])
    swapped, still = tokens[:, [1, 0, 2]], torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)  # sharp enough attention to see the difference
    same = [model(t, positions=still)[:, -1] for t in (tokens, swapped)]
    differ = [model(t)[:, -1] for t in (tokens, swapped)]
    torch.testing.assert_close(*same)
    assert not torch.allclose(*differ)


def test_a_mask_per_query_keeps_documents_apart(tiny_decoder, tokens):
    documents = torch.tensor([0] * 4 + [1] * 7)
    mask = (documents[:, None] == documents)[None].expand(3, -1, -1)
    positions = torch.cat([torch.arange(4), torch.arange(7)])
    packed = tiny_decoder(tokens, mask=mask, positions=positions)
    alone = torch.cat([tiny_decoder(tokens[:, :4]), tiny_decoder(tokens[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(tiny_config, tokens):
    model = build(tiny_config).train()
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_weights_have_the_stated_spread():
    model = build(ModelConfig(vocab_size=500, hidden_size=128, num_layers=3, num_heads=4, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        expected = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        error = 5 * expected / math.sqrt(2 * parameter.numel())  # five standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(expected, abs=error), name


def test_a_new_model_is_as_good_as_guessing(tiny_config):
    tokens = torch.randint(0, 61, (8, 32))
    logits = build(tiny_config)(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(61), rel=0.02)


def test_parameters_by_part_worked_by_hand():
    """D=24, 4 heads of 6, 2 kv heads, F=64, 2 layers, V=61, untied:
    embedding 61*24; attention 2*(24*24 + 2*24*12 + 24*24); mlp 2*3*24*64; norms (2*2+1)*24; head 61*24."""
    counts = count_parameters(build(ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False)))
    by_hand = dict(embedding=1464, attention=3456, mlp=9216, norms=120, head=1464, other=0)
    assert counts == by_hand | {"total": sum(by_hand.values())}
    assert count_parameters(build(ModelConfig(**SIZES, num_kv_heads=2)))["head"] == 0


def test_attention_maps_are_causal_and_sum_to_one(tiny_decoder, tokens):
    maps = attention_maps(tiny_decoder.train(), tokens)
    assert tiny_decoder.training and len(maps) == 2
    for weights in maps:
        assert weights.shape == (3, 4, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 11))
        assert (weights.triu(1) == 0).all()
    v = tiny_decoder.layers[0].self_attn.v_proj(tiny_decoder.layers[0].attn_norm(tiny_decoder.embed_tokens(tokens)))
    v = v.view(3, 11, 2, 6).transpose(1, 2).repeat_interleave(2, 1)
    read = tiny_decoder.layers[0].self_attn.o_proj((maps[0] @ v).transpose(1, 2).flatten(2))
    seen = []
    hook = tiny_decoder.layers[0].self_attn.register_forward_hook(lambda *call: seen.append(call[-1]))
    tiny_decoder(tokens)
    hook.remove()
    torch.testing.assert_close(seen[0], read, rtol=0, atol=1e-6)


def test_too_long_a_sequence_says_both_lengths(tiny_decoder):
    with pytest.raises(ValueError, match=r"has 65 positions and the model at most max_positions=64: shorten"):
        tiny_decoder(torch.zeros(1, 65, dtype=torch.long))
    cache = [KVCache() for _ in tiny_decoder.layers]
    tiny_decoder(torch.zeros(1, 64, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="has 65 positions"):
        tiny_decoder(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_mask_of_another_length_is_refused(tiny_decoder, tokens):
    with pytest.raises(ValueError, match="mask speaks of 10 positions, but there are 0 cached and 11 new ones"):
        tiny_decoder(tokens, mask=torch.ones(3, 10, dtype=torch.bool))


def test_a_config_lists_everything_wrong():
    with pytest.raises(ValueError) as error:
        ModelConfig(hidden_size=0, mlp="gatd", dropout=2.0, activation="swish")
    for part in ("hidden_size=0: must be at least 1", "did you mean gated", "dropout=2.0", "activation='swish'"):
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        ModelConfig(hidden_size=30, num_heads=4, num_kv_heads=3, head_dim=None)
    assert "must be a multiple of num_kv_heads=3" in str(error.value) and "num_heads=4; or give head_dim" in str(
        error.value
    )
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        ModelConfig(hidden_size=30, num_heads=6)


def test_what_a_config_leaves_open_follows_from_the_rest():
    config = ModelConfig(hidden_size=48, num_heads=4)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (4, 12, 128)
    assert ModelConfig(hidden_size=48, num_heads=4, mlp="plain").intermediate_size == 192


def test_a_given_head_size_need_not_divide_the_width():
    model = build(ModelConfig(hidden_size=16, num_heads=3, head_dim=4, vocab_size=9, num_layers=1))
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 9)


@pytest.mark.parametrize("field, value", [("init_std", math.nan), ("rope_theta", 0.0), ("norm_eps", -1.0)])
def test_numbers_that_make_no_model_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*must be a number"):
        ModelConfig(**{field: value})


def test_sinusoidal_positions_do_not_drown_the_embeddings():
    """x = sqrt(D) embedding + PE: Vaswani et al. 2017, section 3.4 and 3.5."""
    model = build(ModelConfig(**SIZES, positions="sinusoidal")).eval()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([[7, 7]]))
    embedding = model.embed_tokens.weight[7] * math.sqrt(24)
    torch.testing.assert_close(seen[0][0], embedding + model.embed_positions(torch.arange(2)))
