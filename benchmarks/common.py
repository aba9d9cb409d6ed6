"""What the benchmarks share: a clock, a memory gauge, a peer with equal weights, and a record of what was measured.

Time is the CPU time of this process on one thread: on a shared machine the wall clock says more about the neighbours.
The sides of a comparison take turns, and only their ratio is meant to be compared with another day's.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
TINY = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688}  # a Llama small enough for one core ...
LAYERS, HEADS = 6, 8  # ... whose depth and heads we and the Hub name differently

torch.set_num_threads(1)
os.environ.setdefault("MINILLM_BACKEND", "torch")  # before minillm is imported; benchmarks of kernels choose them


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that a benchmark should reach. `path` leads to it in what `measure()` returns.

    `note` says in one sentence why the goal is missed, if it is; the README's table prints it then.
    """

    what: str
    path: tuple[str, ...]
    limit: float
    at_least: bool = False  # else at most
    note: str = ""

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        measured: Any = result
        for key in self.path:
            measured = measured[key]
        met = measured >= self.limit if self.at_least else measured <= self.limit
        sign = ">=" if self.at_least else "<="
        return {"what": self.what, "goal": f"{sign} {self.limit}", "measured": measured, "met": met, "note": self.note}


def interleaved(
    sides: dict[str, Callable[[], Any]], *, repeats: int = 9, inner: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """CPU milliseconds of each side, `repeats` times the mean over `inner` calls, the sides in turn."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warmup):
        for run in sides.values():
            run()
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            for _ in range(inner):
                run()
            samples[name].append(round(1e3 * (time.process_time() - start) / inner, 4))
    return samples


def compare(sides: dict[str, Callable[[], Any]], ours: str, theirs: str, **options: int) -> dict[str, Any]:
    """`interleaved`, with the medians and the ratio of ours to theirs (below 1: ours is faster)."""
    samples = interleaved(sides, **options)
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    return {"cpu_ms": medians, "time_ratio": round(medians[ours] / medians[theirs], 3), "samples_ms": samples}


def added_memory(run: Callable[[], Any]) -> float:
    """MiB by which the resident memory of this process peaks during `run` over what it holds before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _resident("VmRSS")
    run()
    return round(_resident("VmHWM") - before, 1)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def compare_memory(script: str, ours: str, theirs: str, repeats: int = 5) -> dict[str, Any]:
    """Median peaks in MiB of two sides and their ratio; each sample is `python script --memory side`, a new process."""
    samples: dict[str, list[float]] = {ours: [], theirs: []}
    for _ in range(repeats):
        for side, values in samples.items():
            command = [sys.executable, script, "--memory", side]
            values.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    medians = {side: round(statistics.median(values), 1) for side, values in samples.items()}
    return {"peak_mib": medians, "memory_ratio": round(medians[ours] / medians[theirs], 3), "samples_mib": samples}


def hub_llama(ours: nn.Module, **options: Any) -> nn.Module:
    """transformers' LlamaForCausalLM with the sizes and the weights of our decoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=ours.config.num_layers,
        num_attention_heads=ours.config.num_heads,
        num_key_value_heads=ours.config.num_kv_heads,
        max_position_embeddings=ours.config.max_positions,
        rms_norm_eps=ours.config.norm_eps,
        tie_word_embeddings=ours.config.tie_embeddings,
        attn_implementation="sdpa",
        **{size: getattr(ours.config, size) for size in TINY},
        **options,
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict({hub_name(name): tensor for name, tensor in ours.state_dict().items()})
    return theirs


def hub_name(name: str) -> str:
    """The name of our decoder's parameter `name` in transformers' Llama."""
    name = name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm")
    return name if name.startswith("lm_head") else f"model.{name}"


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Stop unless every pair of gradients agrees: |a - b| <= tolerance |b|. Another computation is no comparison."""
    assert ours and ours.keys() == theirs.keys(), f"different parameters train: {ours.keys() ^ theirs.keys()}"
    for name, gradient in ours.items():
        error = ((gradient - theirs[name]).norm() / theirs[name].norm()).item()
        assert error <= tolerance, f"the gradients of {name} differ by {error}"


def record(name: str, result: dict[str, Any], goals: list[Goal]) -> dict[str, Any]:
    """Write results/cpu-<name>.json: what was measured, on what, with which versions, and which goals it meets."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft", "numpy")}
    content = {
        "name": name,
        "command": f"python benchmarks/run.py {name}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
        "goals": [goal.judge(result) for goal in goals],
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cpu-{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return content


def _commit() -> str:
    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
