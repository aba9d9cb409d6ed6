"""What every tuning method promises. A new method joins by one line in CASES."""

import copy
import subprocess
import sys

import pytest
import torch

from minillm.layers import KVCache
from minillm.peft import (
    METHODS,
    FullConfig,
    LoraConfig,
    PartialConfig,
    load_adapter,
    merge,
    save_adapter,
    tune,
    unload,
)

# the base of the `decoder` fixture: D = 16, F = 20, V = 41, 3 layers; q_proj is 16 -> 16, up_proj 16 -> 20
BASE = 41 * 16 + 3 * (2 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20) + 16 + 16 * 41
CASES = {  # name -> config, number of trainable values by the paper's formula
    "lora": (LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "mlp.up_proj")), 3 * 3 * ((16 + 16) + (16 + 20))),
    "full": (FullConfig(), BASE),
    "partial": (PartialConfig(("norm", "lm_head")), 16 + 41 * 16),
}
ADAPTERS = ["lora"]  # methods that leave the base's own weights alone
METHOD = pytest.mark.parametrize("method", CASES)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, tokens, loss_fn, steps, lr=0.01):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_fn(model, tokens).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_method_is_here():
    assert set(CASES) == set(METHODS)


@METHOD
def test_starts_as_identity(method, decoder, tokens):
    before = decoder(tokens)
    tune(decoder, CASES[method][0])
    assert torch.equal(decoder(tokens), before)


@METHOD
def test_trainable_count_is_the_formula(method, decoder):
    config, count = CASES[method]
    report = tune(decoder, config)
    assert sum(p.numel() for p in trainable(decoder).values()) == report.trainable == count
    assert report.total == sum(p.numel() for p in decoder.parameters())
    assert f"{method}: {count:,} of {report.total:,} values train" in str(report)


@METHOD
def test_gradient_reaches_what_trains_and_nothing_else(method, decoder, tokens, loss_fn):
    tune(decoder, CASES[method][0])
    frozen = {name: p.clone() for name, p in decoder.named_parameters() if not p.requires_grad}
    train(decoder, tokens, loss_fn, steps=1)  # one step first: at a LoRA's start dL/dA = 0
    decoder.zero_grad()
    loss_fn(decoder, tokens).value.backward()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.count_nonzero(), name
        else:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name


@METHOD
def test_five_steps_lower_the_loss(method, decoder, tokens, loss_fn):
    tune(decoder, CASES[method][0])
    losses = train(decoder, tokens, loss_fn, steps=6)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]


@METHOD
def test_save_then_load_into_a_fresh_base(method, decoder, tokens, loss_fn, tmp_path):
    fresh = copy.deepcopy(decoder)
    report = tune(decoder, CASES[method][0])
    train(decoder, tokens, loss_fn, steps=3)
    save_adapter(decoder, tmp_path / "adapter")
    assert load_adapter(fresh, tmp_path / "adapter") == report
    assert torch.equal(fresh(tokens), decoder(tokens))
    assert trainable(fresh).keys() == trainable(decoder).keys()


@METHOD
def test_saved_file_weighs_what_its_parameters_weigh(method, decoder, tmp_path):
    report = tune(decoder, CASES[method][0])
    save_adapter(decoder, tmp_path / "adapter")
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == 4 * report.trainable


@METHOD
def test_unload_restores_the_base_or_says_why_not(method, decoder, perturb):
    decoder.norm.weight.requires_grad_(False)  # the base's own flags come back too
    before = copy.deepcopy(decoder)
    tune(decoder, CASES[method][0])
    perturb(decoder)
    if method not in ADAPTERS:
        with pytest.raises(ValueError, match="trained the base's own weights; load the base again"):
            unload(decoder)
        return
    unload(decoder)
    assert [(n, type(m)) for n, m in decoder.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    for (name, ours), (was, theirs) in zip(decoder.named_parameters(), before.named_parameters(), strict=True):
        assert name == was and torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
    tune(decoder, CASES[method][0])  # and it can be tuned again


@METHOD
def test_merge_gives_the_keys_of_the_base_and_the_same_outputs(method, decoder, tokens, loss_fn):
    keys = list(decoder.state_dict())
    modules = {name: type(module) for name, module in decoder.named_modules()}
    tune(decoder, CASES[method][0])
    train(decoder, tokens, loss_fn, steps=3, lr=0.1)
    tuned = decoder(tokens)
    change = merge(decoder)
    assert list(decoder.state_dict()) == keys
    assert {name: type(module) for name, module in decoder.named_modules()} == modules
    assert all(p.requires_grad for p in decoder.parameters())  # an ordinary model again
    assert (change > 0) == (method in ADAPTERS)
    # float32: rounding W + s B A moves a weight by 2^-24 of itself; three layers and a head of logits ~10 leave 1e-4
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)


@METHOD
def test_gradient_checkpointing_changes_no_gradient(method, decoder, tokens, loss_fn, perturb):
    tune(decoder, CASES[method][0])
    perturb(decoder)
    gradients = []
    for decoder.gradient_checkpointing in (False, True):
        decoder.zero_grad()
        loss_fn(decoder, tokens).value.backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(decoder).items()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@METHOD
def test_autocast_gives_float32_gradients_near_the_exact_ones(method, decoder, tokens, loss_fn, perturb):
    tune(decoder, CASES[method][0])
    perturb(decoder)
    gradients = []
    for enabled in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_fn(decoder, tokens).value
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(decoder).values()]))
    exact, cast = gradients
    assert cast.dtype == torch.float32
    assert (cast - exact).norm() < 0.05 * exact.norm()  # bfloat16 products keep 8 bits, some layers deep


@METHOD
def test_cached_equals_uncached_and_padding_changes_nothing(method, decoder, tokens, perturb):
    tune(decoder, CASES[method][0])
    perturb(decoder).eval()
    expected = decoder(tokens)
    cache = [KVCache() for _ in decoder.layers]
    steps = [decoder(tokens[:, :5], cache=cache)] + [decoder(tokens[:, t : t + 1], cache=cache) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    padding = torch.zeros_like(tokens[:, :2])
    real = torch.ones_like(tokens, dtype=torch.bool)
    left = decoder(torch.cat([padding, tokens], 1), mask=torch.cat([padding.bool(), real], 1))[:, 2:]
    right = decoder(torch.cat([tokens, padding], 1), mask=torch.cat([real, padding.bool()], 1))[:, :-2]
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-4)


@METHOD
def test_tuning_twice_is_refused(method, decoder):
    tune(decoder, CASES[method][0])
    before = copy.deepcopy(decoder)
    with pytest.raises(ValueError, match=r"tuned already; merge.model. or unload.model. it first"):
        tune(decoder, CASES[method][0])
    assert list(decoder.state_dict()) == list(before.state_dict())


COMPILED = """
import sys, torch
from minillm.models import Decoder, ModelConfig
from minillm.peft import *

torch.manual_seed(0)
tokens = torch.arange(18).view(2, 9)
for config in eval(sys.argv[1]):
    model = Decoder(ModelConfig(vocab_size=41, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4,
                                intermediate_size=20, max_positions=32, tie_embeddings=False, init_std=0.2))
    tune(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p += 0.1 * torch.randn(p.shape)
    outputs, gradients = [], []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        outputs.append(run(tokens))
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), trainable))
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
"""


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    """Traced forward and backward equal the eager ones. No code is generated, so no C++ compiler is needed.

    In a process of its own: the run-time shape checks of these tests cannot be traced.
    """
    configs = repr([config for config, _ in CASES.values()])
    done = subprocess.run([sys.executable, "-c", COMPILED, configs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
