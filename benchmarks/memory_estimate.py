"""The memory that `training_memory` foretells, against what a process takes on for a training step.

    python benchmarks/run.py memory_estimate

Each case runs in a process of its own: two steps (forward, backward, AdamW) of a model of 20 to 30 million parameters,
measured as the peak of resident memory over that of the built model; the second step has AdamW's moments.

glibc keeps freed blocks for later instead of giving them back, which says nothing of what the step needs. So it is told
to give each tensor pages of its own; "as is" is what it takes without.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from common import Goal, added_memory
from torch import nn

from minillm.models import ModelConfig, build
from minillm.models.memory import training_memory
from minillm.models.size import model_size
from minillm.ops import linear_cross_entropy
from minillm.peft import LoraConfig, tune
from minillm.training import TrainConfig, make_optimizer

LLAMA = ModelConfig(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2)
GPT2 = dataclasses.replace(
    LLAMA, num_kv_heads=8, positions="learned", norm="layer", mlp="plain", activation="gelu_tanh",
    intermediate_size=2048, attention_bias=True, mlp_bias=True, dropout=0.1, attention_dropout=0.0,
)  # fmt: skip
BERT = dataclasses.replace(
    GPT2, kind="encoder", activation="gelu", norm_first=False, embed_norm=True, token_types=2, dropout=0.0
)
T5 = ModelConfig(
    kind="encoder_decoder", vocab_size=8192, hidden_size=384, num_layers=4, num_heads=6, positions="relative",
    mlp="plain", activation="relu",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    config: ModelConfig
    method: str
    checkpointing: bool = False
    precision: str = "float32"
    batch_size: int = 4
    length: int = 256


CASES = {
    "Llama, full": Case(LLAMA, "full"),
    "Llama, full, recomputing": Case(LLAMA, "full", True),
    "Llama, full, bfloat16": Case(LLAMA, "full", precision="bfloat16"),
    "Llama, LoRA": Case(LLAMA, "lora"),
    "Llama, LoRA, recomputing": Case(LLAMA, "lora", True, batch_size=8),
    "Llama, LoRA, bfloat16": Case(LLAMA, "lora", precision="bfloat16"),
    "GPT-2, full": Case(GPT2, "full"),
    "BERT, full": Case(BERT, "full"),
    "T5, LoRA": Case(T5, "lora"),
}

GOALS = [Goal("memory of a training step, largest error of the estimate", ("largest error",), 0.15)]


def training_step(case: Case) -> Callable[[], None]:
    """What the trainer does, for a decoder or encoder-decoder with its language-model loss, for an encoder without."""
    torch.manual_seed(0)
    half = case.precision == "bfloat16"
    model: nn.Module = build(case.config).train()
    if case.method == "lora":
        tune(model.to(torch.bfloat16) if half else model, LoraConfig(rank=8))
    model.gradient_checkpointing = case.checkpointing
    tokens = torch.randint(case.config.vocab_size, (case.batch_size, case.length))
    inputs = (tokens, tokens) if case.config.kind == "encoder_decoder" else (tokens,)
    optimizer = make_optimizer(model, TrainConfig())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half and case.method == "full"):
            hidden = model.hidden(*inputs).flatten(0, 1)
            if case.config.kind == "encoder":
                loss = hidden.square().mean()
            else:
                loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens.flatten()) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(name: str) -> float:
    """MiB that two steps take on over the built model, after a small one has loaded all code."""
    case = CASES[name]
    small = dataclasses.replace(case.config, hidden_size=48, num_heads=2, num_kv_heads=2, head_dim=24, vocab_size=64)
    training_step(dataclasses.replace(case, config=small, batch_size=1, length=8))()
    step = training_step(case)
    return added_memory(lambda: (step(), step()))


def estimate(case: Case) -> float:
    """MiB over the built model's weights."""
    options = {"batch_size": case.batch_size, "length": case.length, "checkpointing": case.checkpointing}
    memory = training_memory(case.config, case.method, precision=case.precision, device="cpu", **options)
    built = memory.weights - (2 * model_size(case.config).quantised if _casts(case) else 0)
    return round((memory.peak - built) / 2**20, 1)


def _casts(case: Case) -> bool:
    return case.method == "full" and case.precision == "bfloat16"


def measure() -> dict:
    cases = {}
    for name, case in CASES.items():
        measured, foretold = in_a_process(name, MALLOC_MMAP_THRESHOLD_="65536"), estimate(case)
        cases[name] = {
            "parameters": model_size(case.config).total,
            "tokens": f"{case.batch_size} x {case.length}",
            "measured_mib": measured,
            "estimated_mib": foretold,
            "ratio": round(foretold / measured, 3),
            "as_is_mib": in_a_process(name),
        }
    return {"largest error": round(max(abs(case["ratio"] - 1) for case in cases.values()), 3), "cases": cases}


def in_a_process(name: str, **environment: str) -> float:
    command, variables = [sys.executable, __file__, "--memory", name], os.environ | environment
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables).stdout)


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--memory"], "run it by: python benchmarks/run.py memory_estimate"
    print(peak(sys.argv[2]))
