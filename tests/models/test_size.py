"""Parameters, bytes, cache and arithmetic by formula: against built models, kept caches, and counted operations."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minillm.layers import KVCache
from minillm.models import ModelConfig, build, count_parameters
from minillm.models.size import model_size
from minillm.ops import use_backend
from minillm.peft import LoraConfig, tune

TINY = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_positions": 32}


@st.composite
def configs(draw):
    kind = draw(st.sampled_from(["decoder", "encoder", "encoder_decoder"]))
    choices = {
        "num_kv_heads": [None, 1, 2],
        "head_dim": [None, 8],
        "norm": ["rms", "layer"],
        "norm_first": [True, False],
        "positions": ["rope", "learned", "sinusoidal", "relative"],
        "mlp": ["gated", "plain"],
        "attention_bias": [True, False, "qkv"],
        "mlp_bias": [True, False],
        "qk_norm": [True, False],
        "embed_norm": [True, False],
        "tie_embeddings": [True, False],
        "token_types": [0, 2] if kind == "encoder" else [0],
        "num_decoder_layers": [None, 3] if kind == "encoder_decoder" else [None],
    }
    return ModelConfig(**TINY, kind=kind, **{name: draw(st.sampled_from(values)) for name, values in choices.items()})


@settings(max_examples=60, deadline=None)
@given(configs())
def test_the_formula_counts_what_is_built_part_by_part(config):
    with torch.device("meta"):
        counts = count_parameters(build(config))
    assert counts.pop("other") == 0
    assert model_size(config).parameters == counts


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "o_proj"), ("all-linear",)])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_lora_s_parameters_are_those_that_train(kind, targets):
    config = ModelConfig(**TINY, kind=kind, num_kv_heads=2)
    report = tune(build(config), LoraConfig(rank=3, targets=targets))
    assert model_size(config).lora_parameters(3, targets) == report.trainable
    with pytest.raises(ValueError, match=r"no linear layers called w_proj: choose from q_proj, .*all-linear"):
        model_size(config).lora_parameters(3, ("w_proj",))


def test_bytes_by_dtype():
    """By hand: each of 2 blocks has q 24 x 24, k and v 24 x 12, o 24 x 24, three MLP matrices 24 x 40, no bias.

    Weights: 576 + 288 + 288 + 576 + 3 * 960 = 4608 a block, 9216 in all; the rest is the embedding 61 * 24 = 1464 and
    five norms of 24, 1584 in all. int8 has a scale of 4 bytes for each output: 24 + 12 + 12 + 24 + 40 + 40 + 24 = 176
    a block. NF4 has one for 64 weights: 9 + 5 + 5 + 9 + 3 * 15 = 73 a block (4.5 and 4.5 are rounded up).
    """
    size = model_size(ModelConfig(**TINY, num_kv_heads=2, intermediate_size=40))
    assert (size.total, size.quantised) == (9216 + 1584, 9216)
    assert size.bytes("float32") == 4 * 10800 and size.bytes("bfloat16") == size.bytes() == 2 * 10800
    assert size.bytes("int8") == 2 * 1584 + 9216 + 4 * 2 * 176
    assert size.bytes("nf4") == 2 * 1584 + 9216 // 2 + 4 * 2 * 73
    with pytest.raises(ValueError, match="dtype='int4': did you mean"):
        size.bytes("int4")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_the_cache_is_as_large_as_a_filled_one(kind, kv_heads):
    config = ModelConfig(**TINY, kind=kind, num_kv_heads=kv_heads)
    model, caches = build(config).eval(), [KVCache() for _ in range(2)]
    tokens, source = torch.randint(61, (1, 7)), torch.randint(61, (1, 5))
    model(*([source] if kind == "encoder_decoder" else []), tokens, cache=caches)
    kept = [t for cache in caches for t in (cache.keys, cache.values, cache.memory.keys, cache.memory.values)]
    held = sum(tensor.nbytes for tensor in kept if tensor is not None)
    assert model_size(config).kv_cache_bytes(7, source_length=5, dtype="float32") == held


def test_the_cache_of_a_window_stops_growing_and_an_encoder_has_none():
    """A token's keys and values: 2 * 4 heads * 6 features * 2 bytes = 96 in each layer."""
    windowed = model_size(ModelConfig(**TINY, sliding_window=(4, 0)))
    assert [windowed.kv_cache_bytes(length) for length in (1, 4, 10)] == [96 * 2, 96 * 8, 96 * (4 + 10)]
    assert model_size(ModelConfig(**TINY, kind="encoder")).kv_cache_bytes(10) == 0


@pytest.mark.parametrize("mlp", ["gated", "plain"])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_flops_are_the_operations_that_torch_counts(kind, mlp):
    """torch counts matrix products only, and under a causal mask also pairs that are then hidden: these we take off.

    A backward pass costs each product twice, so training is three times as much.
    """
    config = ModelConfig(**TINY, kind=kind, num_kv_heads=2, head_dim=8, mlp=mlp, tie_embeddings=False)
    model, tokens, source = build(config), torch.randint(61, (1, 9)), torch.randint(61, (1, 5))
    inputs = (source, tokens) if kind == "encoder_decoder" else (tokens,)
    hidden = 0 if kind == "encoder" else 2 * 4 * 4 * 8 * (9 * 9 - 9 * 10 // 2)  # layers, operations, heads, features
    with use_backend("reference"), FlopCounterMode(display=False) as forward:
        output = model(*inputs)
    flops = model_size(config).forward_flops(9, source_length=5)
    assert flops == forward.get_total_flops() - hidden
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    if kind == "decoder":
        size = model_size(config)
        assert size.flops_per_token(9, training=True) == 3 * size.flops_per_token(9) == 3 * flops / 9


def test_flops_of_a_window_count_the_pairs_that_are_seen():
    """Ten queries with a window of 4 see 1 + 2 + 3 + 7 * 4 = 34 keys, all together 55; 4 * 24 operations each."""
    full = ModelConfig(**TINY)
    windowed = replace(full, sliding_window=4)
    difference = model_size(full).forward_flops(10) - model_size(windowed).forward_flops(10)
    assert difference == 2 * 4 * 24 * (55 - 34)


def test_flops_are_about_2_n_and_6_n():
    """Kaplan et al. 2020, section 2.1: N without embeddings, for rows much shorter than 12 hidden sizes."""
    config = ModelConfig(hidden_size=1024, num_layers=8, num_heads=8, vocab_size=64, tie_embeddings=True)
    size = model_size(config)
    n = size.total - size.parameters["embedding"]
    assert size.flops_per_token(32) == pytest.approx(2 * n, rel=0.01)
    assert size.flops_per_token(32, training=True) == pytest.approx(6 * n, rel=0.01)


def test_a_size_by_name():
    assert model_size("gpt2").total == 124_439_808
    with pytest.raises(ValueError, match="no model card called 'gpt5'; did you mean gpt2"):
        model_size("gpt5")
