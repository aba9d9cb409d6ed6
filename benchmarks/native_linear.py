"""Our kernels of linear layers on the processor: few rows, low-rank updates, mixed batches of adapters, NF4.

    python benchmarks/run.py native_linear

Numbers are speed-ups: the other side's median time over ours. "Cold" weights are many matrices in turn, more than the
last cache holds, "warm" one alone. Every pair of sides is first seen to give the same numbers.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Goal, interleaved
from torch import Tensor

from minillm import ops
from minillm.ops import quantize_nf4
from minillm.ops.linear import linear

REPEATS, COLD = 9, 80 * 2**20  # bytes
LAYERS = {"256 x 688": (256, 688), "688 x 256": (688, 256), "1024 x 1024": (1024, 1024), "768 x 3072": (768, 3072)}
BANKS = {  # rows = adapters, features, rank
    "64 adapters of rank 8, 256 features": (64, 256, 8),
    "32 adapters of rank 16, 1024 features": (32, 1024, 16),
    "64 adapters of rank 16, 2048 features": (64, 2048, 16),
}
SMALL_BANK, BANK, LARGE_BANK = BANKS
WIDE = 4096
MEMORY = "both sides wait for the same memory: ours reads as fast as a copy does, and torch more than half of that"
CACHED = "not proved: one megabyte of matrices probably stays in the second cache, also when it is copied"
NOTES = {SMALL_BANK: CACHED}
FASTER_NOW = "the goal was set against an earlier way back to numbers, which took 222 ms; it takes 48 ms now"

GOALS = [
    *(
        Goal(
            f"linear kernel, 1 row, cold weights {name}: speed-up over torch",
            ("linear", name, "cold"),
            1.8,
            True,
            MEMORY,
        )
        for name in LAYERS
    ),
    *(
        Goal(f"linear kernel, 1 row, warm weight {name}: speed-up", ("linear", name, "warm"), 1.0, True)
        for name in ("1024 x 1024", "768 x 3072")
    ),
    Goal("LoRA linear kernel, 1 row, cold 1024 x 1024: speed-up over peft's formula", ("lora", "peft"), 1.2, True),
    Goal("... over our torch formulation", ("lora", "torch"), 1.0, True),
    *(Goal(f"mixed batch, {name}: speed-up over a loop", ("bank", name, "loop"), 5.0, True) for name in BANKS),
    *(
        Goal(f"... {name}: over gathered copies", ("bank", name, "gather"), 10.0, True, NOTES.get(name, ""))
        for name in BANKS
    ),
    Goal("mixed batch, training, 32 rows of 64: speed-up over torch", ("bank training", "torch"), 1.0, True),
    Goal("NF4 product, 4096 x 4096, 1 row: speed-up over float32", ("nf4", "1 row", "float32"), 3.5, True),
    Goal("... over dequantizing in torch", ("nf4", "1 row", "torch"), 100.0, True, FASTER_NOW),
    *(
        Goal(f"NF4 product, {rows}: speed-up over {other}", ("nf4", rows, other), limit, True)
        for rows in ("16 rows", "128 rows", "512 rows")
        for other, limit in (("float32", 0.8),)
    ),
    *(
        Goal(f"NF4 product, {rows}: over dequantizing in torch", ("nf4", rows, "torch"), 10.0, True, FASTER_NOW)
        for rows in ("16 rows", "128 rows", "512 rows")
    ),
    Goal("NF4 quantization of 16 M weights: speed-up over torch", ("nf4", "quantize"), 5.0, True),
]


def speedups(sides: dict[str, Callable[[], Any]], ours: str = "ours", rtol: float = 1e-3) -> dict[str, float]:
    """For each other side, its median time over ours."""
    expected = sides[ours]()
    for run in sides.values():
        torch.testing.assert_close(run(), expected, rtol=rtol, atol=1e-2)
    start = time.process_time()
    sides[ours]()
    inner = max(1, round(0.02 / max(1e-6, time.process_time() - start)))
    samples = interleaved(sides, repeats=REPEATS, inner=inner)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {name: round(value / medians[ours], 3) for name, value in medians.items() if name != ours}


def natively(run: Callable[[], Any]) -> Callable[[], Any]:
    def side() -> Any:
        with ops.use_backend("native"):
            return run()

    return side


def in_turn(run: Callable[..., Tensor], weights: list[tuple]) -> Callable[[], list[Tensor]]:
    return lambda: [run(*weight) for weight in weights]


def linears() -> dict[str, dict[str, float]]:
    result = {}
    for name, (din, dout) in LAYERS.items():
        x = torch.randn(1, 1, din)
        cold = [(x, torch.randn(dout, din)) for _ in range(COLD // (4 * din * dout))]
        result[name] = {
            kind: speedups({"ours": natively(in_turn(linear, weights)), "torch": in_turn(F.linear, weights)})["torch"]
            for kind, weights in (("cold", cold), ("warm", cold[:1] * 20))
        }
    return result


def peft_formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def loras() -> dict[str, float]:
    x, size = torch.randn(1, 1, 1024), (1024, 1024)
    layers = [(x, torch.randn(size), None, torch.randn(8, 1024), torch.randn(1024, 8), 2.0) for _ in range(COLD >> 22)]
    sides = {"torch": in_turn(ops.lora_linear, layers), "peft": in_turn(peft_formula, layers)}
    return speedups({"ours": natively(in_turn(ops.lora_linear, layers)), **sides})


def bank(count: int, features: int, rank: int, length: int = 1) -> tuple[Tensor, ...]:
    """A row of `length` positions for each adapter: y, x, A and B as a bank has them, rows, scale."""
    y, x = torch.randn(2, count, length, features)
    a, b = torch.randn(2, count, rank, features) / features**0.5
    return y, x, a, b.mT, torch.arange(count), torch.full((count,), 2.0)


def loop(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """peft's way: adapter by adapter, the rows that have it picked by a mask."""
    out = y.clone()
    for n in rows.unique().tolist():
        mine = rows == n
        out[mine] += F.linear(F.linear(x[mine], a[n]), b[n]) * scale[n]
    return out


def banks() -> dict[str, dict[str, float]]:
    result = {}
    for name, sizes in BANKS.items():
        arguments = bank(*sizes)
        sides = {"gather": lambda t=arguments: ops.lora_gather(*t), "loop": lambda t=arguments: loop(*t)}
        result[name] = speedups({"ours": natively(sides["gather"]), **sides})
    return result


def bank_training() -> dict[str, float]:
    arguments = bank(32, 512, 16, 64)
    leaves = [t.requires_grad_() for t in arguments[1:4]]
    grad = torch.randn(32, 64, 512)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.lora_gather(*arguments), leaves, grad)

    return speedups({"ours": natively(step), "torch": step})


def nf4() -> dict[str, Any]:
    weight = torch.randn(WIDE, WIDE)
    kept = quantize_nf4(weight)
    rounded, result = kept.dequantize(), {}
    for rows in (1, 4, 16, 128, 512):
        x = torch.randn(rows, WIDE)
        sides = {"float32": lambda x=x: F.linear(x, rounded), "torch": lambda x=x: ops.quantized_linear(x, kept, None)}
        result[f"{rows} row{'s' * (rows > 1)}"] = speedups({"ours": natively(sides["torch"]), **sides})

    def codes() -> Tensor:
        return quantize_nf4(weight).codes

    return result | {"quantize": speedups({"ours": natively(codes), "torch": codes})["torch"]}


def measure() -> dict[str, Any]:
    with torch.no_grad():
        result = {"linear": linears(), "lora": loras(), "bank": banks(), "nf4": nf4()}
    return result | {"bank training": bank_training()}
