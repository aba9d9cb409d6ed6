"""The memory of a training step: the estimate against what torch's allocator hands out while the step runs."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minillm.models import ModelConfig, build
from minillm.models.cards import CARDS
from minillm.models.memory import training_memory
from minillm.models.size import model_size
from minillm.ops import linear_cross_entropy
from minillm.peft import LoraConfig, tune
from minillm.training import TrainConfig, make_optimizer

BATCH, LENGTH = 4, 160
SIZES = {"vocab_size": 2048, "hidden_size": 256, "num_layers": 4, "num_heads": 8, "max_positions": 512}
LAYER_NORM = {"norm": "layer", "mlp": "plain", "positions": "learned", "attention_bias": True, "mlp_bias": True}
T5 = {"kind": "encoder_decoder", "num_layers": 2, "positions": "relative", "mlp": "plain", "activation": "relu"}
SHAPES = {
    "llama": {"num_kv_heads": 2},
    "many words": {"vocab_size": 8192, "num_layers": 2},
    "untied": {"tie_embeddings": False, "qk_norm": True},
    "gpt2": LAYER_NORM | {"activation": "gelu_tanh", "dropout": 0.1, "attention_dropout": 0.0},
    "bert": LAYER_NORM | {"kind": "encoder", "activation": "gelu", "norm_first": False, "embed_norm": True},
    "dropped": LAYER_NORM | {"kind": "encoder", "activation": "gelu", "attention_dropout": 0.1},
    "t5": T5,
}
CASES = [  # shape, method, checkpointing, precision
    ("llama", "full", False, "float32"),
    ("llama", "full", True, "float32"),
    ("llama", "full", False, "bfloat16"),
    ("llama", "lora", False, "float32"),
    ("llama", "lora", True, "float32"),
    ("llama", "lora", False, "bfloat16"),
    ("many words", "full", False, "float32"),
    ("untied", "full", False, "float32"),
    ("gpt2", "full", False, "float32"),
    ("bert", "full", False, "float32"),
    ("bert", "lora", False, "float32"),
    ("dropped", "full", False, "float32"),
    ("t5", "full", False, "float32"),
    ("t5", "lora", True, "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape, method, checkpointing, precision", CASES)
def test_the_estimate_is_within_15_percent_of_what_a_step_takes(shape, method, checkpointing, precision, tmp_path):
    """Both the whole, and what the step adds to the weights and AdamW's moments, which are known exactly."""
    config = ModelConfig(**SIZES | SHAPES[shape])
    model, step = training_step(config, method, checkpointing, precision)
    step()  # AdamW's moments are there from now on
    model.zero_grad()
    held = sum(p.nbytes for p in model.parameters())
    held += sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    added = peak(step, tmp_path)
    options = {"batch_size": BATCH, "length": LENGTH, "checkpointing": checkpointing, "precision": precision}
    estimate = training_memory(config, method, device="cpu", **options)
    copies = estimate.weights - sum(p.nbytes for p in model.parameters())  # autocast's, which the step adds
    assert estimate.optimizer + estimate.weights - copies == held
    assert estimate.peak - held == pytest.approx(added, rel=0.15)


def training_step(config, method, checkpointing, precision):
    """(model, a function that trains it for one step) as the trainer would."""
    model, half = build(config).train(), precision == "bfloat16"
    if method == "lora":
        tune(model.to(torch.bfloat16) if half else model, LoraConfig(rank=8))
    model.gradient_checkpointing = checkpointing
    tokens, optimizer = torch.randint(config.vocab_size, (BATCH, LENGTH)), make_optimizer(model, TrainConfig())
    inputs = (tokens, tokens) if config.kind == "encoder_decoder" else (tokens,)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=half and method == "full"):
            hidden = model.hidden(*inputs).flatten(0, 1)
            if config.kind == "encoder":
                loss = hidden.square().mean()
            else:
                loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens.flatten()) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def peak(run, folder) -> int:
    """Bytes of the CPU allocator at their highest during `run`, over those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = highest = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest


def test_the_parts_of_full_fine_tuning_are_4_4_and_8_bytes():
    """Float32 weights and gradients, and two moments: 16 bytes per parameter (Rajbhandari et al. 2019, section 3.1)."""
    config = ModelConfig(**SIZES)
    memory, total = training_memory(config, precision="float32"), model_size(config).total
    assert (memory.trained, memory.weights, memory.gradients, memory.optimizer) == (
        total,
        4 * total,
        4 * total,
        8 * total,
    )
    assert memory.peak <= sum(
        (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.workspace)
    )


@pytest.mark.parametrize("name", ["llama-3.1-8b", "bert-large", "t5-large"])
def test_each_saving_saves(name):
    config = CARDS[name].config
    full, lora, qlora = (training_memory(name, method, length=512) for method in ("full", "lora", "qlora"))
    assert full.peak > lora.peak > qlora.peak
    assert lora.trained == qlora.trained == model_size(config).lora_parameters()
    assert lora.weights - qlora.weights == model_size(config).bytes() - model_size(config).bytes("nf4")
    for method in ("full", "lora", "qlora"):
        plain, again = (training_memory(config, method, length=512, checkpointing=on) for on in (False, True))
        assert again.activations < plain.activations / 3 and again.peak <= plain.peak


def test_activations_grow_with_the_batch_and_with_the_length():
    """Linearly, as long as no layer stores T x T weights; on a CPU, with attention dropout, they do."""
    kept = {
        (batch, length): training_memory(ModelConfig(**SIZES), batch_size=batch, length=length).activations
        for batch, length in ((1, 128), (3, 128), (1, 384))
    }
    assert kept[3, 128] == 3 * kept[1, 128] == kept[1, 384]
    dropping = ModelConfig(**SIZES, attention_dropout=0.1)
    short, long = (training_memory(dropping, length=length, device="cpu").activations for length in (128, 256))
    assert long > 2 * short
    assert training_memory(dropping, length=256).activations < long


def test_what_is_wrong_is_listed_at_once():
    with pytest.raises(ValueError, match=r"method='lorra': did you mean lora.*precision='fp16'.*at least 1"):
        training_memory(ModelConfig(**SIZES), "lorra", precision="fp16", length=0)
    with pytest.raises(ValueError, match=r"length=513: the model reads at most max_positions=512"):
        training_memory(ModelConfig(**SIZES), length=513)
