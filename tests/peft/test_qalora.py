"""QA-LoRA against its formula in float64 and the LoRA it equals; merging into the zeros is exact, and undone."""

import copy
import json
import math

import peft
import pytest
import torch
from torch import nn

from minillm.ops import quantize_int4
from minillm.peft import (
    LoraConfig,
    LoRALinear,
    load_adapter,
    merge,
    num_parameters,
    save_adapter,
    tune,
    unload,
    unmerge,
)
from minillm.peft.qalora import QaLoraConfig, QALoRALinear
from minillm.peft.quantized_linear import QuantizedLinear, quantize

GROUP = 4
CONFIG = QaLoraConfig(rank=3, alpha=5.0, group=GROUP)


def layer(d_in=12, d_out=7, rank=2, alpha=5.0, dtype=torch.float64, **options):
    """The adapted layer, B not zero, as after training."""
    base = nn.Linear(d_in, d_out, dtype=dtype)
    ours = QALoRALinear(QuantizedLinear(base, quantize_int4(base.weight, group=GROUP)), rank, alpha, **options)
    nn.init.normal_(ours.lora_B, std=0.3)
    return ours


def rounded(model):
    """(name, layer) of every quantized layer."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def test_equals_the_formula_and_gradients_are_its_own():
    """y_o = sum_i W_oi x_i + b_o + s sum_r B_or sum_g A_rg sum_{i in g} x_i, with alpha != rank, by loops' einsum."""
    ours = layer()
    x = torch.randn(4, 3, 12, dtype=torch.float64, requires_grad=True)
    pooled = torch.stack([x[..., g * GROUP : (g + 1) * GROUP].sum(-1) for g in range(3)], -1)
    update = torch.einsum("or,rg,btg->bto", ours.lora_B, ours.lora_A, pooled)
    expected = x @ ours.base.quantized.dequantize(torch.float64).T + ours.base.bias + 5 / 2 * update
    y, leaves = ours(x), (x, ours.lora_A, ours.lora_B)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad))
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(ours, {"lora_A": a, "lora_B": b}, x), leaves
    )


def test_equals_a_lora_that_repeats_the_columns_of_a():
    ours = layer(dtype=torch.float32)
    plain = LoRALinear(ours.base, rank=2, alpha=5.0)
    with torch.no_grad():
        plain.lora_A.copy_(ours.lora_A.repeat_interleave(GROUP, 1))
        plain.lora_B.copy_(ours.lora_B)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nn.functional.linear(x, ours.weight, ours.bias), ours(x), rtol=1e-5, atol=1e-5)


def test_starts_as_that_lora_does():
    """Its A is uniform within 1 / sqrt(Din) of 0; within 1 / sqrt(L) the update would start sqrt(G) times as fast."""
    ours = QaLoraConfig(rank=16, alpha=16, group=16)
    model = nn.Sequential(nn.Linear(256, 300))
    tune(model, ours)
    assert model[0].lora_A.shape == (16, 16) and model[0].lora_B.count_nonzero() == 0
    assert model[0].lora_A.abs().max() <= 1 / 16
    assert abs(model[0].lora_A.std().item() - 1 / 16 / 3**0.5) < 0.004  # of a uniform distribution; 256 samples


def test_trainable_values():
    """R (Din / G + Dout): for 4096 x 4096, R 64, G 32 it is 64 (128 + 4096), 52 % of LoRA's 64 * 8192."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 64))
    config = QaLoraConfig(rank=64, group=32)
    assert num_parameters(config, model) == 64 * (128 + 4096) + 64 * (128 + 64)
    assert list(config.plan(model).parameters) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


def test_the_mean_over_groups_is_another_convention():
    """The authors' code takes the mean: G times less, so one alpha means two things. peft multiplies it by L, not G."""
    ours = layer(d_in=24)
    x = torch.randn(4, 24, dtype=torch.float64)
    update = ours(x) - ours.base(x)
    mean = nn.functional.avg_pool1d(x, GROUP)
    through = 5 / 2 * mean @ ours.lora_A.T @ ours.lora_B.T
    torch.testing.assert_close(update, GROUP * through)
    assert 24 // GROUP != GROUP and not torch.allclose(update, 24 // GROUP * through)


def test_dropout_acts_on_the_pooled_input_of_the_branch():
    ours = layer(dropout=0.5).train()
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(3)
    y = ours(x)
    torch.manual_seed(3)
    pooled = ours.dropout(x.view(6, 3, GROUP).sum(-1))
    torch.testing.assert_close(y, ours.base(x) + 5 / 2 * pooled @ ours.lora_A.T @ ours.lora_B.T)
    assert torch.equal(ours.eval()(x), ours(x)) and not torch.allclose(ours(x), y)


def test_merging_is_exact_and_leaves_every_code_as_it_is(decoder, tokens, perturb):
    tune(decoder, CONFIG)
    perturb(decoder)
    tuned = decoder(tokens)
    codes = {name.removesuffix(".base"): module.codes.clone() for name, module in rounded(decoder)}
    layer = decoder.layers[1].mlp.up_proj
    weight = layer.base.quantized.dequantize(torch.float64)
    weight = weight + 5 / 3 * (layer.lora_B.double() @ layer.lora_A.double()).repeat_interleave(GROUP, 1)
    merge(decoder)
    merged = dict(rounded(decoder))
    assert merged.keys() == codes.keys() and len(codes) == 21
    assert all(torch.equal(module.codes, codes[name]) for name, module in merged.items())
    new = merged["layers.1.mlp.up_proj"].quantized.dequantize(torch.float64)
    torch.testing.assert_close(new, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-5, atol=1e-5)


def test_merging_a_plain_lora_and_quantizing_again_is_not_exact():
    """What QA-LoRA is for: the error is thousands of times larger where the codes must hold the sum."""
    base = nn.Linear(64, 48, bias=False)
    kept = quantize_int4(base.weight, group=32)
    ours = QALoRALinear(QuantizedLinear(base, kept), rank=2, alpha=4.0)
    nn.init.normal_(ours.lora_B, std=0.1)
    plain = LoRALinear(ours.base, rank=2, alpha=4.0)
    nn.init.normal_(plain.lora_B, std=0.1)
    ours.requires_grad_(False)
    x = torch.randn(32, 64)
    again = quantize_int4(plain.weight.detach(), group=32).dequantize()
    requantized = (x @ again.T - plain(x)).norm() / (plain(x) - ours.base(x)).norm()
    folded = kept._replace(**ours.folded()).dequantize()
    exact = (x @ folded.T - ours(x)).norm() / (ours(x) - ours.base(x)).norm()
    assert exact < 1e-5 and requantized > 0.05


def test_unmerge_is_bit_exact(decoder, tokens, perturb):
    tune(decoder, CONFIG)
    perturb(decoder)
    tuned, state = decoder(tokens), copy.deepcopy(decoder.state_dict())
    for _ in range(3):
        merge(decoder, keep=True)
        assert not any(isinstance(module, QALoRALinear) for module in decoder.modules())
        torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-5, atol=1e-5)
        unmerge(decoder)
    after = decoder.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(decoder(tokens), tuned)


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_groups_without_spread_merge_too(value):
    """(max - min) / 15 is 0 there; the zero must be able to take up an update all the same."""
    base = nn.Linear(8, 4, bias=False)
    nn.init.constant_(base.weight, value)
    model = nn.Sequential(base)
    tune(model, QaLoraConfig(rank=2, group=4))
    nn.init.normal_(model[0].lora_B, std=0.3)
    x = torch.randn(5, 8)
    tuned = model(x)
    merge(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-5)


def test_unload_gives_the_quantized_base_back(decoder, tokens, perturb):
    expected = copy.deepcopy(decoder)
    for name, module in list(expected.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            expected.set_submodule(name, QuantizedLinear(module, quantize_int4(module.weight, group=GROUP)))
    tune(decoder, CONFIG)
    at_start = decoder(tokens)
    perturb(decoder)
    unload(decoder)
    ours, theirs = decoder.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(decoder(tokens), expected(tokens)) and torch.equal(at_start, expected(tokens))


def test_only_targets_are_quantized(decoder):
    tune(decoder, QaLoraConfig(rank=2, group=GROUP, targets=("q_proj", "layers.1.mlp.up_proj")))
    assert [name.removesuffix(".base") for name, _ in rounded(decoder)] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "layers.2.self_attn.q_proj",
    ]


def test_saved_and_loaded_on_the_same_float_base(decoder, tokens, perturb, tmp_path):
    fresh, other = copy.deepcopy(decoder), copy.deepcopy(decoder)
    report = tune(decoder, CONFIG)
    perturb(decoder)
    save_adapter(decoder, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "MINILLM_QALORA"
    assert load_adapter(fresh, tmp_path / "adapter") == report
    assert torch.equal(fresh(tokens), decoder(tokens))
    ours, theirs = decoder.state_dict(), fresh.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        load_adapter(other, tmp_path / "adapter")


def test_on_a_bfloat16_base_under_autocast(decoder, tokens, perturb):
    decoder.to(torch.bfloat16)
    tune(decoder, CONFIG)
    perturb(decoder)
    layer = decoder.layers[0].mlp.down_proj
    assert layer.lora_A.dtype == layer.base.zero.dtype == torch.float32
    x = torch.randn(50, 20).bfloat16()
    exact = x.double() @ (layer.base.quantized.dequantize(torch.float64)).T
    exact += 5 / 3 * x.double().view(50, 5, 4).sum(-1) @ layer.lora_A.double().T @ layer.lora_B.double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-6, atol=0.05)  # bfloat16 keeps 8 bits
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoder(tokens).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters() if p.requires_grad)


def test_groups_are_summed_in_the_dtype_of_the_adapter():
    """(256 + 1) - 256 is 1; in bfloat16, which has no 257, it would be 0."""
    base = nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(base.weight)
    ours = QALoRALinear(QuantizedLinear(base, quantize_int4(base.weight, group=4)), rank=1, alpha=1.0)
    with torch.no_grad():
        ours.lora_A.fill_(1.0), ours.lora_B.fill_(1.0)
    assert ours(torch.tensor([256.0, 1, 0, 0, -256, 0, 0, 0]).bfloat16()).item() == 1.0


def test_peft_ignores_what_it_cannot_quantize():
    """use_qalora on a plain nn.Linear does nothing there, silently: A stays (R, Din). Ours quantizes, or refuses."""
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)),
        peft.LoraConfig(r=2, target_modules=["0"], use_qalora=True, qalora_group_size=4),
    ).get_base_model()[0]
    assert theirs.lora_A["default"].weight.shape == (2, 8)
    model = nn.Sequential(nn.Linear(8, 6))
    tune(model, QaLoraConfig(rank=2, group=4))
    assert model[0].lora_A.shape == (2, 2) and isinstance(model[0].base, QuantizedLinear)
    quantized = nn.Sequential(nn.Linear(8, 6))
    quantize(quantized)
    with pytest.raises(ValueError, match="0: is quantized already, but not in groups of 4 inputs with a zero each"):
        tune(quantized, QaLoraConfig(rank=2, group=4))
    with pytest.raises(ValueError, match="0: is quantized already, but not in groups of 2 inputs"):
        unload(model) or tune(model, QaLoraConfig(rank=2, group=2))


def test_an_int4_base_can_be_tuned_again_and_stacked(decoder, tokens, perturb):
    tune(decoder, CONFIG)
    perturb(decoder)
    merge(decoder)
    before = decoder(tokens)
    tune(decoder, CONFIG)
    assert torch.equal(decoder(tokens), before)
    perturb(decoder)
    tuned = decoder(tokens)
    tune(decoder, QaLoraConfig(rank=2, group=GROUP, targets=("v_proj",)), name="top")
    assert torch.equal(decoder(tokens), tuned)
    perturb(decoder)
    both = decoder(tokens)
    merge(decoder)
    torch.testing.assert_close(decoder(tokens), both, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit(decoder):
    before = {name: type(module) for name, module in decoder.named_modules()}
    with pytest.raises(ValueError) as error:
        tune(decoder, QaLoraConfig(rank=2, group=10, targets=("q_proj", "down_proj", "norm", "w_proj")))
    for line in (
        "layers.{0..2}.self_attn.q_proj: has 16 inputs, which groups of 10 do not divide: group=4 (qalora.group=4)",
        "norm: is a RMSNorm, not a linear layer",
        "'w_proj' matches no module",
    ):
        assert line in str(error.value)
    assert "down_proj:" not in str(error.value)
    with pytest.raises(ValueError, match=r"rank 5 is outside 1..4, the ranks a 16 x 4 matrix can have"):
        tune(decoder, QaLoraConfig(rank=5, group=GROUP, targets=("q_proj",)))
    with torch.no_grad():
        decoder.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj: a weight that holds NaN or infinity"):
        tune(decoder, CONFIG)
    decoder.layers[2].mlp.down_proj.reset_parameters()
    tune(decoder, LoraConfig(rank=2))
    unload(decoder)
    assert {name: type(module) for name, module in decoder.named_modules()} == before
    tune(decoder, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"has adapters in its model, whose base would change"):
        tune(decoder, CONFIG, name="second")


def test_tied_and_transposed_layers_are_refused(tied_decoder):
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(ValueError, match=r"lm_head: its weight is tied with embed_tokens.weight"):
        tune(tied_decoder, QaLoraConfig(rank=2, group=GROUP, targets=("lm_head",)))
    with pytest.raises(ValueError, match=r"0: is transformers' Conv1D; only nn.Linear can be quantized"):
        tune(nn.Sequential(Conv1D(12, 4)), QaLoraConfig(rank=1, group=4))


def test_bad_configs_say_all_that_is_wrong():
    with pytest.raises(ValueError) as error:
        QaLoraConfig(rank=0, alpha=-1, targets=(), group=3, dropout=1.0)
    for line in (
        "rank: a whole",
        "alpha: a number above 0",
        "targets: name",
        "group: an even whole",
        "dropout: a prob",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match=r"group: an even whole number above 0 .*, not '4'"):
        QaLoraConfig(group="4")
