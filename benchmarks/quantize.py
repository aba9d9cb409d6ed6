"""4-bit bases: how long quantizing takes, what a base then weighs, and what a training step costs on it.

    python benchmarks/run.py quantize

The step is forward, backward and AdamW with adapters of rank 8 on every linear layer of the tiny Llama; on the CPU the
codes are made into numbers twice in each, so the ratio is the price of the smaller base. A peer with 4-bit layers
(bitsandbytes) wants a GPU for them.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch
from common import HEADS, LAYERS, TINY, Goal, added_memory, interleaved
from torch import Tensor, nn

from minillm.models import ModelConfig, build
from minillm.ops import quantize_nf4
from minillm.peft import LoraConfig, tune
from minillm.peft.qalora import QaLoraConfig
from minillm.peft.qlora import QLoraConfig
from minillm.peft.quantized_linear import QuantizedLinear, quantize
from minillm.training import TrainConfig, causal_lm_loss, make_optimizer

COUNT, REPEATS = 100_000_000, 7
BATCH, LENGTH, RANK, ALPHA = 8, 256, 8, 16
METHODS = {
    "LoRA": LoraConfig(rank=RANK, alpha=ALPHA, targets=("all-linear",)),
    "QLoRA": QLoraConfig(rank=RANK, alpha=ALPHA),
    "QA-LoRA": QaLoraConfig(rank=8, alpha=ALPHA, group=16),
}

GOALS = [
    Goal("NF4 quantization of 100 M weights, CPU seconds", ("quantize", "cpu_s"), 3.0),
    Goal("linear layers of a base in NF4, bytes / float16", ("base", "bytes_ratio"), 0.29),
]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelConfig(num_layers=LAYERS, num_heads=HEADS, tie_embeddings=False, **TINY))


def quantizing() -> dict[str, Any]:
    """CPU seconds, with double quantization and the way back; and MiB beyond the codes, which are 49 of them."""
    weight = torch.randn(COUNT // 1000, 1000, generator=torch.Generator().manual_seed(1))
    memory = added_memory(lambda: quantize_nf4(weight))
    kept = quantize_nf4(weight)
    seconds: dict[str, list[float]] = {"quantize": [], "dequantize": []}
    for _ in range(REPEATS):
        for side, run in (("quantize", partial(quantize_nf4, weight)), ("dequantize", kept.dequantize)):
            start = time.process_time()
            run()
            seconds[side].append(round(time.process_time() - start, 3))
    held = sum(t.nbytes for t in kept if isinstance(t, Tensor))
    return {
        "cpu_s": statistics.median(seconds["quantize"]),
        "dequantize_cpu_s": statistics.median(seconds["dequantize"]),
        "bits_per_weight": round(8 * held / COUNT, 4),
        "added_mib": memory,
        "held_mib": round(held / 2**20, 1),
        "samples_s": seconds,
    }


def base() -> dict[str, Any]:
    """Bytes of the linear layers of the tiny Llama, all that a layer holds of its weight, code books included."""
    model = llama().half()
    report = quantize(model)
    held = sum(b.nbytes for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers(recurse=False))
    assert held == report.bytes_after
    ratio = report.bytes_after / report.bytes_before
    return {"float16": report.bytes_before, "nf4": report.bytes_after, "bytes_ratio": round(ratio, 4)}


def stepper(config: Any) -> Any:
    """A function that does one training step on the same batch."""
    model = llama()
    tune(model, config)
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(TINY["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    data = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    def step() -> None:
        causal_lm_loss(model, data).value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure() -> dict[str, Any]:
    result = {"quantize": quantizing(), "base": base()}  # first: freed memory of the steps would hide what this adds
    samples = interleaved({name: stepper(config) for name, config in METHODS.items()}, repeats=REPEATS)
    medians = {name: round(statistics.median(values), 1) for name, values in samples.items()}
    ratios = {f"{name} / LoRA": round(medians[name] / medians["LoRA"], 3) for name in METHODS if name != "LoRA"}
    step = {"cpu_ms": medians, "time_ratios": ratios, "samples_ms": samples}
    return result | {"step": step}
