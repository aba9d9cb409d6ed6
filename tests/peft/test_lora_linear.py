"""The LoRA layer against Hugging Face peft: outputs and every gradient, with alpha != rank."""

import copy

import peft
import pytest
import torch
from torch import nn

from minillm.ops import use_backend
from minillm.peft import LoraConfig, LoRALinear, tune


def pair(d_in=5, d_out=7, bias=True, dtype=torch.float32, **config):
    """The same layer in ours and in peft's, with equal random A and B (not zero, as after training)."""
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    rank, alpha, rslora, dropout = (dict(rank=3, alpha=7.0, rslora=False, dropout=0.0) | config).values()
    model = nn.Sequential(copy.deepcopy(base))
    theirs = peft.get_peft_model(
        model,
        peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout, target_modules=["0"]),
    ).get_base_model()[0]
    ours = LoRALinear(base.requires_grad_(False), rank, alpha, rslora=rslora, dropout=dropout)
    with torch.no_grad():
        for mine, hers in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            mine.copy_(torch.randn(mine.shape))
            hers["default"].weight.copy_(mine)
    return ours, theirs


def compare(ours, theirs, x, **tolerance):
    xs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    results = []
    for layer, x, a, b in (
        (ours, xs[0], ours.lora_A, ours.lora_B),
        (theirs, xs[1], theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        torch.manual_seed(1)  # for dropout
        y = layer(x)
        results.append((y, *torch.autograd.grad((y.float() ** 2).sum(), (x, a, b))))
    torch.testing.assert_close(results[0], results[1], **tolerance)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rows", [(1,), (6,), (1, 1), (2, 3)])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 9, 1), (16, 4, 4)])
def test_equals_peft(backend, rows, rslora, sizes):
    d_in, d_out, rank = sizes
    ours, theirs = pair(d_in, d_out, rank=rank, rslora=rslora)
    with use_backend(backend):
        compare(ours, theirs, torch.randn(*rows, d_in), rtol=1e-4, atol=1e-4)


def test_equals_peft_without_bias_and_on_a_transposed_input():
    ours, theirs = pair(bias=False)
    for x in (torch.randn(5, 6).t(), torch.randn(3, 2, 5).transpose(0, 1), torch.randn(4, 9)[:, 2:7]):
        assert not x.is_contiguous()
        compare(ours, theirs, x, rtol=1e-4, atol=1e-4)


def test_equals_peft_with_dropout_from_the_same_seed():
    """Both drop entries of x on the LoRA branch only, so one seed drops the same ones."""
    ours, theirs = pair(dropout=0.5)
    compare(ours.train(), theirs.train(), torch.randn(8, 5))
    compare(ours.eval(), theirs.eval(), torch.randn(8, 5))


def test_dropout_leaves_the_base_path_alone():
    ours, _ = pair(dropout=0.5)
    nn.init.zeros_(ours.lora_B)
    x = torch.randn(8, 5)
    torch.testing.assert_close(ours.train()(x), ours.base(x))


def test_equals_peft_on_a_bfloat16_base_with_float32_adapters():
    ours, theirs = pair(16, 16, dtype=torch.bfloat16)
    assert ours.lora_A.dtype == theirs.lora_A["default"].weight.dtype == torch.float32
    # both round once at the end, from float32 sums in another order: one step of bfloat16 is 2^-7
    compare(ours, theirs, torch.randn(32, 16).bfloat16(), rtol=2**-6, atol=0.05)


def test_rslora_scale_by_hand():
    """alpha = 8 at rank 4: 8 / 4 = 2, and rsLoRA's 8 / sqrt(4) = 4."""
    base = nn.Linear(6, 6)
    assert LoRALinear(base, 4, 8.0).scale == 2.0
    assert LoRALinear(base, 4, 8.0, rslora=True).scale == 4.0


def test_init_is_uniform_within_one_over_sqrt_of_the_input_and_zero():
    layer = LoRALinear(nn.Linear(100, 300), 64, 8.0)
    assert layer.lora_B.count_nonzero() == 0
    assert layer.lora_A.abs().max() <= 0.1  # 1 / sqrt(100)
    assert abs(layer.lora_A.std().item() - 0.1 / 3**0.5) < 0.003  # of a uniform distribution; 6400 samples


def test_weight_is_the_merged_weight_and_trains_the_adapter():
    """What reads `.weight` instead of calling the layer gets W + scale B A: outputs and gradients as from a call."""
    ours, _ = pair()
    x, leaves = torch.randn(4, 5), (ours.lora_A, ours.lora_B)
    read, called = nn.functional.linear(x, ours.weight, ours.bias), ours(x)
    torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (read, called)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_inside_torch_multihead_attention():
    """nn.MultiheadAttention reads out_proj.weight and never calls it: the adapter must still count, and train."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    tune(attention, LoraConfig(rank=2, alpha=4.0, targets=("out_proj",)))
    torch.testing.assert_close(attention(x, x, x)[0], before)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.lora_B.grad.count_nonzero()


@pytest.mark.parametrize("rank", [0, 6])
def test_rank_that_the_layer_cannot_have(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside 1..5, the ranks a 7 x 5 matrix can have"):
        LoRALinear(nn.Linear(5, 7), rank, 8.0)
