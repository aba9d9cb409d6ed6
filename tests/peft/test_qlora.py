"""Layers in 4 bits and LoRA on top: against peft on the rounded weights; what is held, moved, merged and refused."""

import copy
import json
import math

import peft
import pytest
import torch
from torch import nn

from minillm.ops import quantize_nf4
from minillm.peft import LoraConfig, LoRALinear, load_adapter, merge, save_adapter, tune, unload, unmerge
from minillm.peft.linears import matrix
from minillm.peft.lora import LoraConfig as Lora
from minillm.peft.qlora import QLoraConfig, merge_errors
from minillm.peft.quantized_linear import QuantizedLinear, quantize

BODY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer(d_in=10, d_out=7, *, double=True, dtype=torch.float32, **options):
    base = nn.Linear(d_in, d_out, dtype=dtype, **options)
    return base, QuantizedLinear(base, quantize_nf4(base.weight, double=double))


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def same(ours, theirs):
    assert list(ours) == list(theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def rounded(model):
    """The model with plain layers whose weights are what the quantized ones mean."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.unquantized())
    return model


# the layer


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_a_linear_layer_with_the_rounded_weight(double, bias):
    base, ours = layer(double=double, bias=bias)
    expected = quantize_nf4(base.weight, double=double).dequantize()
    assert torch.equal(ours.weight, expected) and torch.equal(matrix(ours), expected)
    assert torch.equal(ours.dequantized(), expected) and not torch.equal(expected, base.weight)
    x = torch.randn(3, 2, 10).transpose(0, 1)
    torch.testing.assert_close(ours(x), nn.functional.linear(x, expected, base.bias))
    plain = ours.unquantized()
    assert type(plain) is nn.Linear and torch.equal(plain.weight, expected) and plain.bias is base.bias


def test_saved_and_loaded_like_any_layer():
    for double in (False, True):
        _, ours = layer(double=double)
        _, other = layer(double=double)
        keys = ["bias", "codes", "absmax"] + ["absmax2", "offset"] * double
        assert list(ours.state_dict()) == keys
        other.load_state_dict(ours.state_dict())
        x = torch.randn(4, 10)
        assert torch.equal(other(x), ours(x)) and torch.equal(copy.deepcopy(ours)(x), ours(x))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "type"])
def test_casting_never_touches_codes_and_scales(cast, double):
    """float16 scales would move every weight of a block; `.type` would even make numbers of the codes."""
    _, ours = layer(double=double)
    before = copy.deepcopy(ours)
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64, "type": torch.float64}[cast]
    model = nn.Sequential(ours)
    model.type(torch.float64) if cast == "type" else getattr(model, cast)()
    assert ours.weight.dtype == ours.bias.dtype == ours.unquantized().weight.dtype == dtype
    assert ours(torch.randn(2, 10, dtype=dtype)).dtype == dtype
    assert torch.equal(ours.weight, before.quantized.dequantize(dtype))
    model.float()
    kept, was = dict(ours.named_buffers()), dict(before.named_buffers())
    assert same(kept, was) and [t.dtype for t in kept.values()] == [t.dtype for t in was.values()]
    assert nn.Sequential(ours).to("meta")[0].codes.is_meta and ours.book.is_meta and ours.weight.is_meta


def test_a_layer_reads_as_what_it_is():
    _, ours = layer(64, 1024, bias=False)
    held = sum(buffer.nbytes for buffer in ours.buffers())
    assert f"{8 * held / 2**16:.2f} bits a weight" in repr(ours) and held < 0.28 * 2 * 2**16 + 3200  # two code books


def test_inside_torch_multihead_attention():
    """nn.MultiheadAttention reads out_proj.weight and never calls it."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    quantize(attention, ("out_proj",))
    expected, x = rounded(attention), torch.randn(2, 3, 8)
    torch.testing.assert_close(attention(x, x, x)[0], expected(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_no_numbers_of_a_weight(dtype):
    """F.linear(x, dequantized) would keep 64 x 256 numbers of each layer for the backward; only inputs are kept."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).to(dtype)
    tune(model, QLoraConfig(rank=2))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 64, dtype=dtype)).float().sum().backward()
    sizes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sizes and max(sizes) <= 2 * 256


# quantize


def test_quantize_takes_every_linear_layer_but_the_head(decoder, tokens):
    twin = copy.deepcopy(decoder)
    report = quantize(decoder)
    assert report.names == tuple(
        f"layers.{i}.{m}.{n}" for i in range(3) for m, n in zip(4 * ["self_attn"] + 3 * ["mlp"], BODY, strict=True)
    )
    assert dict(report.skipped) == {"lm_head": "is an output head"}
    assert "layers.{0..2}.self_attn.q_proj" in str(report) and "not lm_head: is an output head" in str(report)
    weights = sum(twin.get_submodule(name).weight.nbytes for name in report.names)
    held = sum(b.nbytes for name in report.names for b in decoder.get_submodule(name).buffers())
    assert (report.bytes_before, report.bytes_after) == (weights, held)
    with torch.no_grad():
        for name in report.names:
            weight = twin.get_submodule(name).weight
            weight.copy_(quantize_nf4(weight).dequantize())
    torch.testing.assert_close(decoder(tokens), twin(tokens))


def test_quantize_by_name_and_options(decoder):
    report = quantize(decoder, ("layers.1.mlp.up_proj", "lm_head"), block=16, double=False)
    assert report.names == ("layers.1.mlp.up_proj", "lm_head") and not report.skipped
    assert isinstance(decoder.lm_head, QuantizedLinear) and type(decoder.layers[0].mlp.up_proj) is nn.Linear
    assert decoder.lm_head.codes.shape == (41, 8) and decoder.lm_head.absmax2 is None
    assert decoder.layers[1].mlp.up_proj.training


def test_a_layer_in_two_places_is_quantized_once_in_both():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize(model, ("2",))
    assert model[0] is model[2] and isinstance(model[0], QuantizedLinear) and report.names == ("0", "2")
    assert report.bytes_before == 8 * 8 * 4


def test_tied_weights_keep_their_numbers():
    """A tied output layer, whatever its name, would no longer be the embedding."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "up": nn.Linear(8, 8), "out": nn.Linear(8, 9, bias=False)})
    model["out"].weight = model["embed"].weight
    report = quantize(model)
    assert report.names == ("up",) and "tied with embed.weight" in report.skipped["out"]
    with pytest.raises(ValueError, match=r"(?s)cannot be quantized so, and is unchanged.*out: its weight is tied with"):
        quantize(model, ("out",))


def test_what_quantize_refuses(decoder):
    before = kinds(decoder)
    with pytest.raises(ValueError, match=r"(?s)'q_prog' matches no module; did you mean q_proj.*norm: is no linear"):
        quantize(decoder, ("q_prog", "norm"))
    with pytest.raises(ValueError, match="block: an even whole number"):
        quantize(decoder, block=7)
    with pytest.raises(ValueError, match=r"targets: a tuple of names, not the text 'q_proj'; write \('q_proj',\)"):
        quantize(decoder, "q_proj")
    with torch.no_grad():
        decoder.layers[2].mlp.down_proj.weight[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj: a weight that holds NaN or infinity"):
        quantize(decoder)
    with pytest.raises(ValueError, match="unchanged:\n  it has no linear layer"):
        quantize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="unchanged:\n  lm_head is an output head"):
        quantize(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match=r"it is the whole model; put it into one, such as nn.Sequential.layer."):
        quantize(nn.Linear(4, 4))
    assert kinds(decoder) == before
    decoder.layers[2].mlp.down_proj.reset_parameters()
    tune(decoder, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"it has adapters, which belong to the base as it is"):
        quantize(decoder)
    unload(decoder)
    quantize(decoder)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: is quantized already"):
        quantize(decoder, ("layers.0.self_attn.q_proj",))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is quantized already\n"):
        quantize(decoder)


# QLoRA


def sandwich(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6, bias=False)).to(dtype)


def test_equals_peft_on_the_rounded_weights(perturb):
    """Outputs and all gradients in float64, with alpha != rank."""
    ours = sandwich()
    tune(ours, QLoraConfig(rank=3, alpha=7.0, block=16))
    perturb(ours)
    plain = sandwich()
    for i in (0, 2):
        plain[i].weight.data.copy_(quantize_nf4(plain[i].weight, block=16).dequantize(torch.float64))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"])).double()
    adapters = {}
    for i in (0, 2):
        for leaf in ("lora_A", "lora_B"):
            parameter = getattr(theirs.get_base_model()[i], leaf)["default"].weight
            parameter.data.copy_(getattr(ours[i], leaf))
            adapters[i, leaf] = parameter
    xs = [torch.randn(4, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    outputs = [ours(xs[0].requires_grad_()), theirs(xs[1].requires_grad_())]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-10, atol=1e-10)
    for (i, leaf), parameter in adapters.items():
        assert getattr(ours[i], leaf).dtype == torch.float64
        torch.testing.assert_close(getattr(ours[i], leaf).grad, parameter.grad, rtol=1e-10, atol=1e-10)


def test_every_linear_layer_is_quantized_whether_it_is_a_target_or_not(decoder):
    """As in the paper; what trains in full and output heads keep their numbers."""
    whole = ("layers.1.mlp", "layers.2.mlp.up_proj")
    report = tune(decoder, QLoraConfig(rank=2, targets=("q_proj", "lm_head"), trainable=whole))
    types = {name.removesuffix(".base"): kind for name, kind in kinds(decoder).items() if kind is not LoRALinear}
    for i in range(3):
        for name in BODY[:4]:
            assert types[f"layers.{i}.self_attn.{name}"] is QuantizedLinear
        for name in BODY[4:]:
            plain = i == 1 or (i, name) == (2, "up_proj")
            assert types[f"layers.{i}.mlp.{name}"] is (nn.Linear if plain else QuantizedLinear)
    assert types["lm_head"] is nn.Linear and isinstance(decoder.lm_head, LoRALinear)
    assert report.modules == (*(f"layers.{i}.self_attn.q_proj" for i in range(3)), "lm_head", *whole)


def test_on_a_bfloat16_base_under_autocast(decoder, tokens, perturb):
    decoder.to(torch.bfloat16)
    tune(decoder, QLoraConfig(rank=2, dropout=0.1))
    perturb(decoder)
    assert decoder.layers[0].mlp.up_proj.lora_A.dtype == torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = decoder(tokens).float().square().mean()
        loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in decoder.parameters() if p.requires_grad
    )
    decoder.eval()
    with torch.no_grad():
        assert decoder(tokens[:1]).shape == (1, 9, 41)


def test_unload_gives_the_quantized_base(decoder, tokens, perturb):
    twin = copy.deepcopy(decoder)
    quantize(twin)
    tune(decoder, QLoraConfig(rank=2))
    perturb(decoder)
    unload(decoder)
    assert kinds(decoder) == kinds(twin) and same(decoder.state_dict(), twin.state_dict())
    assert torch.equal(decoder(tokens), twin(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_plain_layers_with_what_was_trained(decoder, tokens, perturb, dtype):
    decoder.to(dtype)
    names = kinds(decoder)
    tune(decoder, QLoraConfig(rank=3, alpha=5.0))
    perturb(decoder)
    ours = decoder.layers[1].mlp.up_proj
    exact = ours.base.quantized.dequantize(dtype).double() + 5 / 3 * (ours.lora_B.double() @ ours.lora_A.double())
    tuned, state = decoder(tokens), copy.deepcopy(decoder.state_dict())
    merge(decoder, keep=True)
    assert kinds(decoder) == names
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(decoder.layers[1].mlp.up_proj.weight.double(), exact, rtol=2.01 * half_unit, atol=1e-7)
    if dtype == torch.float32:
        torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)
    unmerge(decoder)
    assert same(decoder.state_dict(), state) and torch.equal(decoder(tokens), tuned)  # codes and adapters as before
    merge(decoder)
    assert kinds(decoder) == names and all(p.requires_grad for p in decoder.parameters())


def test_the_codes_are_no_place_to_merge_into(decoder, perturb):
    """Requantizing W4 + B A loses most of a small update; nothing may do that unasked."""
    tune(decoder, QLoraConfig(rank=2))
    perturb(decoder)
    ours = decoder.layers[0].self_attn.q_proj
    with pytest.raises(AttributeError):
        ours.base.weight = ours.weight
    with pytest.raises(RuntimeError):
        ours.base.load_state_dict({"weight": ours.weight})


def test_errors_of_the_three_ways_to_merge():
    """By hand in float64; the rule of `merge` is the best by orders of magnitude."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    original = base.weight.detach().clone()
    ours = LoRALinear(QuantizedLinear(base, quantize_nf4(base.weight)), rank=4, alpha=6.0)
    nn.init.normal_(ours.lora_B, std=0.02)
    errors = merge_errors(ours, original)
    rounded = quantize_nf4(original).dequantize().double()
    update = 1.5 * (ours.lora_B.double() @ ours.lora_A.double())
    again = quantize_nf4((rounded + update).float()).dequantize().double()
    assert math.isclose(errors["original"], ((original - rounded).norm() / update.norm()).item(), rel_tol=1e-5)
    assert math.isclose(errors["requantized"], ((again - rounded - update).norm() / update.norm()).item(), rel_tol=1e-4)
    assert errors["rounded"] < 1e-5 < 0.1 < min(errors["original"], errors["requantized"])
    assert ours.bfloat16() and 1e-5 < merge_errors(ours, original)["rounded"] < 0.05  # one rounding to 8 bits
    with pytest.raises(ValueError, match="the update is zero"):
        merge_errors(LoRALinear(ours.base, rank=4, alpha=6.0), original)
    for bad in ((LoRALinear(base, 2, 4.0), original), (ours, original.t())):
        with pytest.raises(ValueError, match="needed: a LoRALinear on a QuantizedLinear and its weight"):
            merge_errors(*bad)


def test_saved_as_a_plain_lora_and_loaded_on_the_same_float_base(decoder, tokens, perturb, tmp_path):
    fresh, quantized, other = (copy.deepcopy(decoder) for _ in range(3))
    report = tune(decoder, QLoraConfig(rank=2, alpha=6.0, targets=("q_proj", "up_proj"), double_quantization=False))
    perturb(decoder)
    save_adapter(decoder, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 2, 6)
    assert load_adapter(fresh, tmp_path / "adapter") == report
    assert torch.equal(fresh(tokens), decoder(tokens)) and same(fresh.state_dict(), decoder.state_dict())
    with torch.no_grad():
        other.norm.weight[0] += 1
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        load_adapter(other, tmp_path / "adapter")
    (tmp_path / "adapter" / "minillm.json").unlink()  # what is left is what peft writes
    quantize(quantized, double=False)
    assert load_adapter(quantized, tmp_path / "adapter").method == "lora"
    assert torch.equal(quantized(tokens), decoder(tokens))


def test_lora_on_a_base_that_is_quantized_already(decoder, tokens, perturb, tmp_path):
    quantize(decoder, block=32)
    fresh, twin, before = copy.deepcopy(decoder), copy.deepcopy(decoder), decoder(tokens)
    torch.manual_seed(3)
    tune(decoder, LoraConfig(rank=2, alpha=6.0))
    assert torch.equal(decoder(tokens), before)
    perturb(decoder)
    torch.manual_seed(3)
    tune(twin, QLoraConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj")))  # nothing left to quantize
    perturb(twin)
    assert torch.equal(twin(tokens), decoder(tokens))
    save_adapter(decoder, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(tokens), decoder(tokens))
    tuned = decoder(tokens)
    merge(decoder)
    assert type(decoder.layers[0].self_attn.q_proj) is nn.Linear
    assert type(decoder.layers[0].self_attn.k_proj) is QuantizedLinear
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)


def test_a_second_qlora_on_top(decoder, tokens, perturb):
    tune(decoder, QLoraConfig(rank=2))
    perturb(decoder)
    before = decoder(tokens)
    tune(decoder, QLoraConfig(rank=3, targets=("v_proj",)), name="top")
    assert torch.equal(decoder(tokens), before)
    perturb(decoder)
    tuned = decoder(tokens)
    merge(decoder)
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)


def test_what_qlora_refuses(decoder):
    with pytest.raises(
        ValueError, match=r"(?s)QLoraConfig:.*block: an even whole number.*double_quantization: True or"
    ):
        QLoraConfig(block="64", double_quantization=1)
    with pytest.raises(ValueError, match=r"rank: a rank is a whole number.*\n.*block"):
        QLoraConfig(rank=0, block=3)
    tune(decoder, LoraConfig(rank=2))
    before = kinds(decoder)
    with pytest.raises(ValueError, match=r"(?s)QLoRA does not fit this Decoder, which is unchanged.*it has adapters"):
        tune(decoder, QLoraConfig(rank=2), name="second")
    assert kinds(decoder) == before


def test_transformers_conv1d_is_refused():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"c_attn": Conv1D(12, 4), "up": nn.Linear(4, 8)})
    with pytest.raises(ValueError, match=r"c_attn: is transformers' Conv1D; only nn.Linear can be quantized"):
        tune(model, QLoraConfig(rank=2))
    assert "not c_attn: is transformers' Conv1D" in str(quantize(model))


def test_an_error_while_installing_gives_the_float_weights_back(decoder, monkeypatch):
    before, state = kinds(decoder), copy.deepcopy(decoder.state_dict())

    def fail(self, model, plan):
        assert isinstance(model.layers[0].mlp.up_proj, QuantizedLinear)
        raise RuntimeError("no memory")

    monkeypatch.setattr(Lora, "install", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tune(decoder, QLoraConfig(rank=2))
    assert kinds(decoder) == before and same(decoder.state_dict(), state)
    with torch.no_grad():
        decoder.layers[2].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj: a weight that holds NaN or infinity"):
        tune(decoder, QLoraConfig(rank=2))
    assert kinds(decoder) == before
