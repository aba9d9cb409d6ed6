"""Merging: near the unmerged outputs, rounded once, and undone bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

from minillm.peft import FullConfig, LoraConfig, LoRALinear, merge, save_adapter, tune, unload, unmerge

CONFIG = LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "mlp.down_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_weight_is_the_exact_sum_rounded_once(dtype):
    """Against float64: half a unit in the last place of each weight, however small the update is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, dtype=dtype))
    tune(model, LoraConfig(rank=4, alpha=12.0, targets=("0",)))
    nn.init.normal_(model[0].lora_B, std=0.01)
    layer = model[0]
    exact = layer.base.weight.double() + 3.0 * (layer.lora_B.double() @ layer.lora_A.double())
    before = layer.base.weight.clone()
    change = merge(model)
    half_unit = torch.finfo(dtype).eps / 2  # of a number near 1, relative to it
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # of the sum's own products
    torch.testing.assert_close(model[0].weight.double(), exact, rtol=1.01 * half_unit, atol=wide)
    assert change == (model[0].weight - before).abs().max().item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_is_bit_exact(decoder, tokens, perturb, dtype):
    decoder.to(dtype)
    tune(decoder, CONFIG)
    perturb(decoder)
    before, names, outputs = copy.deepcopy(decoder.state_dict()), list(decoder.state_dict()), decoder(tokens)
    for _ in range(3):  # subtracting what was added would drift
        merge(decoder, keep=True)
        assert not any(isinstance(module, LoRALinear) for module in decoder.modules())
        unmerge(decoder)
    after = decoder.state_dict()
    assert list(after) == names and all(torch.equal(after[name], before[name]) for name in names)
    assert torch.equal(decoder(tokens), outputs)
    trains = [name for name, p in decoder.named_parameters() if p.requires_grad]
    assert trains == [name for name in names if "lora_" in name]


def test_merged_for_a_time_answers_as_the_adapters_do(decoder, tokens, perturb):
    tune(decoder, CONFIG)
    perturb(decoder)
    expected = decoder(tokens)
    merge(decoder, keep=True)
    torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(decoder)
    unmerge(twin)
    assert torch.equal(twin(tokens), expected)


def test_unload_while_merged_gives_the_base_back(decoder, perturb):
    before = copy.deepcopy(decoder.state_dict())
    tune(decoder, CONFIG)
    perturb(decoder)
    merge(decoder, keep=True)
    unload(decoder)
    after = decoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_merging_without_dropout_even_in_training_mode(decoder, tokens, perturb):
    tune(decoder, LoraConfig(rank=2, dropout=0.5))
    perturb(decoder)
    expected = decoder.eval()(tokens)
    merge(decoder.train())
    torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_done(decoder, tmp_path):
    for act, name in ((merge, "merge"), (unload, "unload"), (unmerge, "unmerge")):
        with pytest.raises(ValueError, match=f"nothing to {name}: this Decoder is not tuned"):
            act(decoder)
    tune(decoder, CONFIG)
    with pytest.raises(ValueError, match=r"is not merged: unmerge undoes merge.model, keep=True."):
        unmerge(decoder)
    merge(decoder, keep=True)
    with pytest.raises(ValueError, match=r"merged already; unmerge.model. gives the adapters back"):
        merge(decoder)
    with pytest.raises(ValueError, match=r"merged for a time; unmerge.model. first"):
        save_adapter(decoder, tmp_path / "adapter")
    unmerge(decoder)
    merge(decoder)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(decoder)


def test_merging_what_was_trained_in_place_changes_nothing(decoder, perturb):
    tune(decoder, FullConfig())
    perturb(decoder)
    before = copy.deepcopy(decoder.state_dict())
    assert merge(decoder) == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_merging_never_spoils_the_base():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tune(model, LoraConfig(rank=2, targets=("0", "1")))
    base = [layer.base.weight.clone() for layer in model]
    with torch.no_grad():
        model[1].lora_B.fill_(math.nan)
    with pytest.raises(ValueError, match=r"(?s)merging would spoil the base, which is unchanged.*1: NaN or infinity"):
        merge(model)
    assert all(torch.equal(layer.base.weight, weight) for layer, weight in zip(model, base, strict=True))
