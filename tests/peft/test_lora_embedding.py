"""LoRA on embeddings and on the Hub's Conv1D, against peft."""

import copy

import peft
import pytest
import torch
from torch import nn

from minillm.peft import LoraConfig, LoRAEmbedding, LoRALinear, load_adapter, merge, save_adapter, tune, unload, unmerge


def conv1d(size_out, size_in):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(size_out, size_in)


class Net(nn.Module):
    """An embedding of 11 words, a Conv1D 6 -> 10, a linear layer 10 -> 7."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = conv1d(10, 6)
        self.out = nn.Linear(10, 7)

    def forward(self, tokens):
        return self.out(self.conv(self.words(tokens)))


TOKENS = torch.tensor([[1, 5, 5], [0, 10, 2]])
OURS = LoraConfig(rank=3, alpha=7.0, targets=("words", "conv"), rslora=True)


@pytest.fixture
def nets():
    """(ours tuned, peft's tuned with the same values)"""
    torch.manual_seed(0)
    base = Net().double()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    tune(ours, OURS)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["words", "conv"], use_rslora=True, fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, config)
    values = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                short = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                values[short].normal_()
                parameter.data = values[short].data.clone()
    return ours, theirs


def test_same_outputs_gradients_and_counts_as_peft(nets):
    ours, theirs = nets
    loss = [net(TOKENS).square().sum() for net in nets]
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-12, atol=0)
    for value in loss:
        value.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            short = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            torch.testing.assert_close(gradients[short], parameter.grad, rtol=1e-10, atol=1e-12)


def test_embedding_starts_the_other_way_round():
    torch.manual_seed(0)
    layer = LoRAEmbedding(nn.Embedding(2000, 16), rank=4, alpha=8.0)
    assert not layer.lora_embedding_A.count_nonzero() and abs(layer.lora_embedding_B.std().item() - 1) < 0.2
    layer(torch.tensor([3])).sum().backward()
    assert layer.lora_embedding_A.grad[:, 3].count_nonzero() == 4  # in the first step already
    assert layer.lora_embedding_A.grad.count_nonzero() == 4 and not layer.lora_embedding_B.grad.count_nonzero()


def test_merge_and_unmerge(nets):
    ours, theirs = nets
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = ours(TOKENS)
    merge(ours, keep=True)
    torch.testing.assert_close(ours(TOKENS), expected, rtol=1e-12, atol=1e-12)
    merged = theirs.merge_and_unload()
    for leaf in ("words.weight", "conv.weight"):
        torch.testing.assert_close(ours.get_parameter(leaf), merged.get_parameter(leaf), rtol=1e-12, atol=1e-12)
    unmerge(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_files_go_both_ways(nets, tmp_path):
    ours, theirs = nets
    base = copy.deepcopy(ours)
    unload(base)
    save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(loaded(TOKENS), ours(TOKENS), rtol=1e-12, atol=1e-12)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(base(TOKENS), theirs(TOKENS), rtol=1e-12, atol=1e-12)


def test_rank_above_the_layer_and_padding_row():
    with pytest.raises(ValueError, match=r"rank 7 is outside 1\.\.6"):
        tune(Net(), LoraConfig(rank=7, targets=("words",)))
    layer = LoRAEmbedding(nn.Embedding(5, 4, padding_idx=0), rank=2, alpha=3.0)
    layer(torch.tensor([0, 1])).sum().backward()
    assert not layer.lora_embedding_A.grad[:, 0].count_nonzero()  # as torch's: the padding row learns nothing


def test_adapters_of_a_half_precision_base_are_float32():
    layer = LoRALinear(conv1d(8, 4).to(torch.bfloat16), rank=2, alpha=3.0)
    assert layer.lora_A.dtype == torch.float32 and layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    words = LoRAEmbedding(nn.Embedding(5, 4, dtype=torch.bfloat16), rank=2, alpha=3.0)
    assert words.lora_embedding_A.dtype == torch.float32 and words(torch.tensor([1])).dtype == torch.bfloat16
