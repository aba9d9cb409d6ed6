"""Windows, scaled rotations, normalised queries: Mistral, Llama 3.1, Qwen 2 and Qwen 3 in transformers say the same."""

import pytest
import torch
import torch.nn.functional as F

from minillm.layers import KVCache
from minillm.models import Decoder, ModelConfig, build
from minillm.ops import RopeScaling, use_backend

SIZES = dict(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64)
EXACT = 1e-10  # of the largest, in float64
ROUNDED = {"Llama 3.1": 1e-5}  # frequencies are float32, and a sum of two terms rounds by the order of its factors


def twins(class_name: str, theirs: dict | None = None, **fields) -> tuple[Decoder, torch.nn.Module]:
    """Our decoder and transformers' with the same weights, in float64."""
    import transformers

    ours = build(ModelConfig(**SIZES | fields))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3).add_(parameter.dim() == 1)
    c = ours.config
    config = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="sdpa",  # "eager" rounds the weights to float32
        pad_token_id=None,  # transformers gives a pad token no gradient
        bos_token_id=None,
        eos_token_id=None,
    )
    kind = getattr(transformers, class_name)
    twin = kind(kind.config_class(**config | (theirs or {})))
    twin.load_state_dict({hf_name(name): tensor for name, tensor in ours.state_dict().items()}, strict=True)
    normalise_in_float64(twin)
    return ours.double().eval(), twin.double().eval()


def hf_name(name: str) -> str:
    name = name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm")
    return name if name.startswith("lm_head") else f"model.{name}"


def normalise_in_float64(model: torch.nn.Module) -> None:
    """transformers' RMSNorms round to float32 whatever the model's dtype; torch's own does not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)


def assert_equal(ours, theirs, tolerance=EXACT):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=100.0)
VARIANTS = {  # our fields, transformers' class, its own fields
    "Qwen 3": (dict(qk_norm=True, head_dim=8), "Qwen3ForCausalLM", {}),
    "Qwen 2": (dict(attention_bias="qkv", tie_embeddings=False), "Qwen2ForCausalLM", {}),
    "Llama 3.1": (
        dict(rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 32), rope_theta=100.0),
        "LlamaForCausalLM",
        dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
    ),
    "linear": (
        dict(rope_scaling=RopeScaling("linear", 2.5)),
        "LlamaForCausalLM",
        dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10000.0)),
    ),
    "Mistral": (dict(sliding_window=5), "MistralForCausalLM", dict(sliding_window=5)),
    "two windows": (
        dict(sliding_window=(0, 3)),
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"]),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_all_gradients(name, backend):
    (fields, class_name, extra), tolerance = VARIANTS[name], ROUNDED.get(name, EXACT)
    if class_name == "Qwen2ForCausalLM":
        fields = dict(attention_bias="qkv") | fields
    ours, theirs = twins(class_name, extra, **fields)
    tokens = torch.randint(0, 61, (2, 17))
    with use_backend(backend):
        logits = ours(tokens)
    expected = theirs(tokens).logits
    assert_equal(logits, expected, tolerance)
    for output in (logits, expected):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {hf_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert_equal(gradients.pop(name), parameter.grad, tolerance)
    assert not gradients


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Mistral", "Llama 3.1", "Qwen 3"])
def test_padding_on_either_side(name, side):
    (fields, class_name, extra), tolerance = VARIANTS[name], ROUNDED.get(name, EXACT)
    ours, theirs = twins(class_name, extra, **fields)
    mask = torch.arange(13) < torch.tensor([13, 9, 2])[:, None]
    mask = mask if side == "right" else mask.flip(1)
    tokens = torch.randint(0, 61, mask.shape)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert_equal(ours(tokens, mask=mask)[mask], expected[mask], tolerance)
    alone = ours(tokens[1][mask[1]][None])
    assert_equal(ours(tokens, mask=mask)[1][mask[1]], alone[0])


@pytest.mark.parametrize("fields", [dict(sliding_window=4), dict(sliding_window=(0, 4)), dict(sliding_window=(1, 20))])
@pytest.mark.parametrize("pieces", [[1] * 15, [9, 1, 1, 4], [2, 6, 7]], ids=str)
def test_a_window_with_a_cache_is_the_same_window(fields, pieces):
    ours, _ = twins("MistralForCausalLM", {}, **fields)
    mask = torch.arange(15) >= torch.tensor([0, 6])[:, None]
    tokens, cache, end, given = torch.randint(0, 61, mask.shape), [KVCache() for _ in ours.layers], 0, []
    for piece in tokens.split(pieces, 1):
        end += piece.shape[1]
        given.append(ours(piece, mask=mask[:, :end], cache=cache))
    assert_equal(torch.cat(given, 1)[mask], ours(tokens, mask=mask)[mask])
    cache = [KVCache() for _ in ours.layers]
    without_mask = torch.cat([ours(piece, cache=cache) for piece in tokens.split(pieces, 1)], 1)
    assert_equal(without_mask, ours(tokens))


def test_a_window_ends_where_it_says():
    """One layer: what is `window` tokens back is out of reach, what is one nearer is not."""
    model = build(ModelConfig(**SIZES | dict(num_layers=1, sliding_window=3))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = torch.randint(0, 61, (1, 8))
    before = model(tokens)
    for changed, reached in ((4, False), (5, True), (7, True)):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        assert torch.equal(model(other)[0, 7], before[0, 7]) != reached, changed


def test_relative_positions_reach_across_a_cache_and_a_prefix():
    """A decoder with T5's biases; a learned prefix in the cache has none."""
    model = build(ModelConfig(**SIZES | dict(positions="relative", relative_buckets=6, relative_distance=9))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = torch.randint(0, 61, (2, 15))
    prefixes = [[torch.randn(1, 2, 3, 6).double() for _ in range(2)] for _ in model.layers]
    for start in (lambda: [KVCache() for _ in model.layers], lambda: [KVCache(tuple(p)) for p in prefixes]):
        whole, cache = model(tokens, cache=start()), start()
        pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 1, 9], 1)]
        assert_equal(torch.cat(pieces, 1), whole)
    bias = model.relative_positions(15, 15)
    seen = []
    model.layers[1].self_attn.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    model(tokens)
    assert torch.equal(seen[0]["bias"], bias) and model.layers[0].self_attn.scale == 1.0
