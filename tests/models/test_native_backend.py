"""Whole models on our kernels: the same numbers and the same tokens as on PyTorch's operations, with no word of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillm import ops
from minillm.generation import generate_tokens
from minillm.generation.decode_mode import DecodeMode
from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, LoRALinear, PrefixConfig, QaLoraConfig, QuantizedLinear, quantize, tune

pytestmark = pytest.mark.usefixtures("native_library")
ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 61, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_positions": 80, "init_std": 0.1}
MODELS = {
    "rotary, grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "window": {"num_kv_heads": 2, "sliding_window": 5},
    "learned positions": {"positions": "learned", "norm": "layer"},
    "encoder": {"kind": "encoder", "positions": "learned", "norm": "layer"},
    "encoder and decoder": {"kind": "encoder_decoder", "positions": "learned", "norm": "layer", "decoder_start_id": 1},
}


def model_of(name):
    torch.manual_seed(2)
    return build(ModelConfig(**SIZES | MODELS[name]))


def batch_of(model):
    """Tokens with padding on the left in one row, on the right in the other."""
    tokens = torch.randint(2, 61, (2, 23))
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :6], mask[1, 17:] = False, False
    if model.config.kind == "encoder_decoder":
        return {"source": tokens, "source_mask": mask, "tokens": tokens[:, :9]}
    return {"tokens": tokens, "mask": mask}


def outcome(model, batch, backend):
    """Outputs at real positions, and the gradients of all parameters."""
    with ops.use_backend(backend):
        y = model(**batch)
        keep = batch.get("mask", torch.ones(y.shape[:2], dtype=torch.bool))
        loss = F.mse_loss(y[keep], torch.ones_like(y[keep]))
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)
        return y[keep], *grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_torch(name, checkpointing):
    model = model_of(name)
    for part in model.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = checkpointing
    batch = batch_of(model)
    for ours, theirs in zip(outcome(model, batch, "native"), outcome(model, batch, "torch"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rotary, grouped", "window", "encoder"])
def test_bfloat16_is_as_near_to_float64_as_torch_is(name):
    model = model_of(name)
    batch = batch_of(model)
    true = outcome(model.double(), batch, "reference")[0]
    model.bfloat16()
    ours, theirs = (outcome(model, batch, backend)[0].double() for backend in ("native", "torch"))
    assert (ours - true).norm() <= 1.2 * (theirs - true).norm()


@pytest.mark.parametrize("tuned", [None, "lora", "prefix", "nf4", "nf4 and lora", "qalora"])
@pytest.mark.parametrize("name", ["rotary, grouped", "window", "learned positions"])
def test_greedy_tokens_are_those_of_torch(name, tuned):
    """Prompts of different lengths, padded on the left, with a cache that grows past its first buffers."""
    model = model_of(name).eval()
    if tuned and "nf4" in tuned:
        quantize(model)
    if tuned not in (None, "nf4"):
        configs = {"prefix": PrefixConfig(length=3), "qalora": QaLoraConfig(rank=3, group=8, targets=("all-linear",))}
        tune(model, configs.get(tuned, LoraConfig(rank=3, alpha=7, targets=("all-linear",))))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
    tokens, mask = torch.randint(2, 61, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :7], mask[2, :1] = False, False
    told = {}
    for backend in ("native", "auto", "torch"):
        with ops.use_backend(backend):
            told[backend] = generate_tokens(model, tokens, mask=mask, max_new_tokens=40)
    assert torch.equal(told["native"], told["torch"]) and torch.equal(told["auto"], told["torch"])


@pytest.mark.parametrize("tuned", ["nf4", "lora", "nf4 and lora"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_generation_asks_once_whether_a_layer_runs_on_its_kernel(backend, tuned, monkeypatch):
    """Asking at each token costs as much as the product of a small layer. Afterwards the layers are as before."""
    model, asked = model_of("rotary, grouped").eval(), []
    if "nf4" in tuned:
        quantize(model)
    if "lora" in tuned:
        tune(model, LoraConfig(rank=3, targets=("all-linear",)))
    kind = LoRALinear if "lora" in tuned else QuantizedLinear
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: asked.append(1) or forward(self, x))
    layers = sum(type(module) is kind for module in model.modules())
    with ops.use_backend(backend):
        generate_tokens(model, torch.randint(2, 61, (1, 5)), max_new_tokens=10)
        assert len(asked) == (0 if backend == "auto" else 10 * layers)
        asked.clear()
        model(torch.randint(2, 61, (1, 5)))
        assert len(asked) == layers


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bfloat16_generation_with_a_quantized_base(adapter):
    """Adapters of float32 are added in float32, as without kernels."""
    model = model_of("rotary, grouped").eval().bfloat16()
    quantize(model)
    tune(model, LoraConfig(rank=3, targets=("all-linear",)))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.to(adapter)
    tokens, logits = torch.randint(2, 61, (1, 5)), {}
    for backend in ("native", "torch"):
        with ops.use_backend(backend), DecodeMode(model, rows=1, prepare=True):
            logits[backend] = model(tokens)
    with ops.use_backend("reference"), torch.no_grad():
        true = model.double()(tokens)
    ours, theirs = ((logits[backend] - true).abs().max() for backend in ("native", "torch"))
    assert ours <= 2 * theirs, (ours, theirs)


def test_autocast_computes_in_bfloat16_as_with_torch():
    model, results = model_of("rotary, grouped"), []
    batch = batch_of(model)
    for backend in ("auto", "torch"):
        with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            results.append(model(**batch)[batch["mask"]])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_auto_takes_the_kernels_and_leaves_to_torch_what_they_cannot():
    """Attention dropout has no kernel: training with it falls to torch, is counted, and the same model then evaluates
    on the kernel."""
    model = build(ModelConfig(**SIZES, attention_dropout=0.5))
    op, reason = ops.OPS["attention"], "dropout of attention weights"
    before = op.refused[reason]
    with ops.use_backend("auto"):
        model.train()(torch.randint(2, 61, (1, 7)))
        assert op.refused[reason] == before + model.config.num_layers
        model.eval()(torch.randint(2, 61, (1, 7)))
        assert op.refused[reason] == before + model.config.num_layers


COMPILED = """
import sys
import torch
from minillm import ops
from minillm.models import ModelConfig, build

torch.manual_seed(0)
model = build(ModelConfig(vocab_size=61, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=80))
tokens, mask = torch.randint(2, 61, (2, 23)), torch.ones(2, 23, dtype=torch.bool)
mask[0, :6] = False
ops.use_backend("native")
runs = model, torch.compile(model, fullgraph=True, backend=sys.argv[1])
outputs = [run(tokens, mask=mask) for run in runs]
torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in outputs]
torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_decoder_compiles_whole(backend):
    """Forward and backward in one graph; in a process of its own, where no annotations are checked."""
    run = subprocess.run([sys.executable, "-c", COMPILED, backend], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
