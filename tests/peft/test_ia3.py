"""(IA)3 against the formula and Hugging Face peft: outputs, every gradient, counts, files, merging."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minillm.config import from_dict, to_dict
from minillm.peft import LoraConfig, load_adapter, merge, num_parameters, save_adapter, tune, unload, unmerge
from minillm.peft.ia3 import Ia3Config, IA3Linear

PEFT_CONFIG = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


def layer(d_in=5, d_out=7, *, feedforward=False, dtype=torch.float64, conv1d=False):
    """(a layer with random factors, its weight as (Dout, Din), its bias)"""
    torch.manual_seed(0)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(d_out, d_in).to(dtype)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(d_in, d_out, dtype=dtype)
    wrapped = IA3Linear(base, feedforward=feedforward)
    nn.init.normal_(wrapped.ia3_l, 1.0, 0.5)
    return wrapped, base.weight.t() if conv1d else base.weight, base.bias


def compare(ours, theirs, tokens, **tolerance):
    """Outputs, and the gradient of every factor."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        logits = model(tokens)
        logits = getattr(logits, "logits", logits)
        logits.square().mean().backward()
        factors = [p.grad for name, p in model.named_parameters() if "ia3_l" in name]
        assert all(p.grad is None for name, p in model.named_parameters() if "ia3_l" not in name)
        results.append((logits, factors))
    torch.testing.assert_close(results[0], results[1], **tolerance)


def same_factors(ours, theirs):
    """Random factors, the same in both; the models have them in the same order."""
    pairs = [[p for name, p in model.named_parameters() if "ia3_l" in name] for model in (ours, theirs)]
    with torch.no_grad():
        for mine, hers in zip(*pairs, strict=True):
            hers.copy_(mine.normal_(1.0, 0.3))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rows", [(1,), (6,), (2, 3)])
def test_factors_are_on_the_output_and_scale_the_bias_too(rows, conv1d):
    ours, weight, bias = layer(conv1d=conv1d)
    x = torch.randn(*rows, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), (x @ weight.t() + bias) * ours.ia3_l.flatten())
    assert ours.ia3_l.shape == (7, 1)


@pytest.mark.parametrize("conv1d", [False, True])
def test_feedforward_factors_are_on_the_input_and_leave_the_bias_alone(conv1d):
    """Toy mistake: scaling the down projection's output, which has D features instead of F."""
    ours, weight, bias = layer(feedforward=True, conv1d=conv1d)
    x = torch.randn(3, 2, 5, dtype=torch.float64).transpose(0, 1)
    x = x.contiguous() if conv1d else x  # Conv1D itself takes no other
    torch.testing.assert_close(ours(x), (x * ours.ia3_l.flatten()) @ weight.t() + bias)
    assert ours.ia3_l.shape == (1, 5)


def test_gradients_of_factors_and_input():
    for feedforward in (False, True):
        ours, _, _ = layer(feedforward=feedforward)
        ours.base.requires_grad_(False)
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

        def run(x, factors, layer=ours):
            return torch.func.functional_call(layer, {"ia3_l": factors}, (x,))

        assert torch.autograd.gradcheck(run, (x, ours.ia3_l))


def test_starts_as_identity_with_factors_of_one(decoder, tokens):
    """Toy mistakes: zeros (the features are gone) or random factors (the pretrained model is gone)."""
    before = decoder(tokens)
    tune(decoder, Ia3Config())
    assert torch.equal(decoder(tokens), before)
    assert all((p == 1).all() for name, p in decoder.named_parameters() if name.endswith("ia3_l"))


def test_count_is_the_features_that_are_scaled(decoder):
    """k and v of 2 heads of 4 features, 20 inner activations, 3 layers."""
    expected = 3 * (2 * 4 + 2 * 4 + 20)
    assert num_parameters(Ia3Config(), decoder) == expected
    twin = copy.deepcopy(decoder)
    assert tune(decoder, Ia3Config()).trainable == expected
    assert peft.get_peft_model(twin, PEFT_CONFIG).get_nb_trainable_parameters()[0] == expected
    every = dict(feedforward=())
    assert num_parameters(Ia3Config(("k_proj", "v_proj", "down_proj"), **every), decoder) == 3 * (8 + 8 + 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_peft_around_our_decoder(decoder, tokens, dtype):
    decoder.to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(decoder), PEFT_CONFIG, autocast_adapter_dtype=False).to(dtype)
    tune(decoder, Ia3Config())
    same_factors(decoder, theirs)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    compare(decoder, theirs, tokens, rtol=tolerance, atol=tolerance)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4, n_positions=32)).eval()


def test_equals_peft_on_the_transposed_layers_of_gpt2(tokens):
    """Fused queries, keys and values have one vector of 3 D factors, as in peft; the paper scales k and v only."""
    model = gpt2()
    peft_config = peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), peft_config)
    report = tune(model, Ia3Config(("c_attn", "mlp.c_proj"), ("mlp.c_proj",)))
    assert report.trainable == theirs.get_nb_trainable_parameters()[0] == 2 * (48 + 64)
    same_factors(model, theirs)
    compare(model, theirs, tokens, rtol=1e-4, atol=1e-5)
    expected = model(tokens).logits
    assert merge(model) > 0
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_peft_reads_ours_and_we_read_peft(llama, tokens, perturb, tmp_path):
    bases = [copy.deepcopy(llama) for _ in range(3)]
    tune(llama, Ia3Config())
    save_adapter(perturb(llama), tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(bases[0], tmp_path / "ours").eval()
    torch.testing.assert_close(read(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)

    theirs = peft.get_peft_model(bases[1], PEFT_CONFIG).eval()
    perturb(theirs, seed=3).save_pretrained(tmp_path / "theirs")
    report = load_adapter(bases[2], tmp_path / "theirs")
    torch.testing.assert_close(bases[2](tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]

    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    kinds = [{key: (tensor.shape, tensor.dtype) for key, tensor in file.items()} for file in files]
    assert kinds[0] == kinds[1]
    assert kinds[0]["base_model.model.model.layers.0.mlp.down_proj.ia3_l"] == ((1, 20), torch.float32)
    assert kinds[0]["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"] == ((8, 1), torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        Ia3Config(("all-linear",), ("down_proj",)),
        Ia3Config(("mlp.down_proj", "k_proj"), ("down_proj",)),  # peft wants a subset, word for word
        Ia3Config(("q_proj", "layers.1.self_attn.k_proj"), ("layers.1.self_attn.k_proj",), trainable=("model.norm",)),
        Ia3Config(("v_proj",), ()),
    ],
)
def test_every_way_of_naming_reaches_peft(llama, tokens, perturb, tmp_path, config):
    fresh, third = copy.deepcopy(llama), copy.deepcopy(llama)
    report = tune(llama, config)
    save_adapter(perturb(llama), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter" / "minillm.json").unlink()  # as if by peft
    assert load_adapter(third, tmp_path / "adapter") == report
    assert torch.equal(third(tokens).logits, llama(tokens).logits)


class Pair(nn.Module):
    """Two layers, the name of one of them the end of the other's."""

    def __init__(self):
        super().__init__()
        self.proj, self.sub_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.sub_proj(torch.tanh(self.proj(x)))


def test_feedforward_names_are_whole_segments_also_to_peft(perturb, tmp_path):
    """Toy mistake: peft compares the ends of texts here, so that its "proj" is "sub_proj" too."""
    torch.manual_seed(0)
    model = Pair()
    fresh, loose, again = (copy.deepcopy(model) for _ in range(3))
    x = torch.randn(4, 6)
    tune(model, Ia3Config(("proj", "sub_proj"), ("proj",)))
    assert model.proj.feedforward and not model.sub_proj.feedforward
    save_adapter(perturb(model), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x))
    config = peft.IA3Config(target_modules=["proj", "sub_proj"], feedforward_modules=["proj"])
    theirs = perturb(peft.get_peft_model(loose, config))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs")
    assert again.sub_proj.feedforward
    torch.testing.assert_close(again(x), theirs(x))


def test_a_head_that_peft_names_by_the_end_of_a_text(llama, tokens, perturb, tmp_path):
    """Its "norm" is every layer's input_layernorm too."""
    fresh = copy.deepcopy(llama)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"])
    theirs = perturb(peft.get_peft_model(llama, config).eval())
    theirs.save_pretrained(tmp_path)
    report = load_adapter(fresh, tmp_path)
    assert report.trainable == theirs.get_nb_trainable_parameters()[0] == 2 * 8 + 5 * 16
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_peft_can_and_we_cannot_is_refused(llama, tmp_path):
    peft.get_peft_model(copy.deepcopy(llama), PEFT_CONFIG).save_pretrained(tmp_path)
    config = peft.IA3Config.from_pretrained(tmp_path)
    config.exclude_modules = ["layers.0.self_attn.k_proj"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)needs what this \(IA\)3 cannot do.*exclude_modules = "):
        load_adapter(llama, tmp_path)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_folded_weight_and_bias_give_the_same_layer(feedforward, conv1d):
    """Toy mistake: the weight is scaled and the bias forgotten."""
    ours, _, _ = layer(feedforward=feedforward, conv1d=conv1d)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = ours(x)
    folded = ours.folded()
    assert folded.keys() == ({"weight"} if feedforward else {"weight", "bias"})
    torch.testing.assert_close(torch.func.functional_call(ours.base, folded, (x,)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_is_bit_exact(decoder, tokens, perturb, dtype):
    """peft divides by the factors to unmerge, which loses bits and a factor of 0 altogether."""
    decoder.to(dtype)
    tune(decoder, Ia3Config())
    perturb(decoder)
    k = decoder.layers[0].self_attn.k_proj
    nn.init.zeros_(k.ia3_l[:2])
    before, expected = copy.deepcopy(decoder.state_dict()), decoder(tokens)
    exact = k.base.weight.double() * k.ia3_l.double()
    merge(decoder, keep=True)
    merged = decoder.layers[0].self_attn.k_proj.weight
    assert merged.dtype == dtype
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(merged.double(), exact, rtol=1.01 * half_unit, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-4)
    unmerge(decoder)
    after = decoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(decoder(tokens), expected)


def test_factors_are_float32_on_a_bfloat16_base(decoder, tokens):
    tune(decoder.to(torch.bfloat16), Ia3Config())
    factors = [p for name, p in decoder.named_parameters() if name.endswith("ia3_l")]
    assert {p.dtype for p in factors} == {torch.float32}
    logits = decoder(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.count_nonzero() for p in factors)


@pytest.mark.parametrize("first", [LoraConfig(rank=2, targets=("k_proj", "down_proj")), Ia3Config()])
def test_stacked_with_lora(decoder, tokens, perturb, first):
    """On the same layers, in both orders: merged equals unmerged, and unloading gives the one below back."""
    second = Ia3Config() if isinstance(first, LoraConfig) else LoraConfig(rank=2, targets=("k_proj", "down_proj"))
    tune(decoder, first, "first")
    below = perturb(decoder)(tokens)
    tune(decoder, second, "second")
    torch.testing.assert_close(decoder(tokens), below)
    perturb(decoder, seed=3)
    k, x = decoder.layers[0].self_attn.k_proj, torch.randn(3, 16)
    torch.testing.assert_close(k(x), x @ k.weight.t())  # what code that reads the weight sees
    expected, state = decoder(tokens), copy.deepcopy(decoder.state_dict())
    assert not torch.allclose(expected, below, atol=1e-3)
    merge(decoder, keep=True)
    torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-4)
    unmerge(decoder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items())
    unload(decoder, "second")
    assert torch.equal(decoder(tokens), below)


def test_on_quantized_layers(decoder, tokens, perturb):
    """The factors need no weight to scale; merged, such a layer is one of plain numbers."""
    from minillm.peft.quantized_linear import QuantizedLinear, quantize

    quantize(decoder, ("k_proj", "down_proj"), block=16)
    before = decoder(tokens)
    tune(decoder, Ia3Config())
    assert torch.equal(decoder(tokens), before)
    expected = perturb(decoder)(tokens)
    decoder(tokens).square().mean().backward()
    assert all(p.grad.count_nonzero() for name, p in decoder.named_parameters() if name.endswith("ia3_l"))
    merge(decoder, keep=True)
    torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-4)
    unmerge(decoder)
    assert torch.equal(decoder(tokens), expected)
    unload(decoder)
    assert isinstance(decoder.layers[0].mlp.down_proj, QuantizedLinear) and torch.equal(decoder(tokens), before)


def test_the_output_projection_of_torchs_attention_which_is_read_not_called():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    attention.out_proj = IA3Linear(attention.out_proj)
    torch.testing.assert_close(attention(x, x, x)[0], before)
    nn.init.constant_(attention.out_proj.ia3_l, 2.0)
    torch.testing.assert_close(attention(x, x, x)[0], 2 * before)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.ia3_l.grad.count_nonzero()


def test_bad_configs_and_targets(decoder):
    with pytest.raises(
        ValueError, match=r"(?s)feedforward: a tuple of names, not the text.*targets: name at least one"
    ):
        Ia3Config((), "down_proj")
    with pytest.raises(ValueError) as error:
        tune(decoder, Ia3Config(("k_proj", "wo"), ("k_proj", "down_proj")))
    assert "(IA)3 does not fit this Decoder, which is unchanged" in str(error.value)
    assert "'wo' matches no module" in str(error.value)
    assert "'down_proj' matches no target (in feedforward)" in str(error.value)
    with pytest.raises(ValueError, match=r"layers.\{0..2\}.mlp: is a GatedMLP, not a linear layer"):
        tune(decoder, Ia3Config(("mlp",), ()))
    assert not any(isinstance(module, IA3Linear) for module in decoder.modules())


def test_config_survives_json():
    config = Ia3Config(("k", "wo"), ("wo",), trainable=("norm",))
    assert from_dict(Ia3Config, to_dict(config)) == config
