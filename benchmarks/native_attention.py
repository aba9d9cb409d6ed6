"""Our attention and rotary kernels on the processor against PyTorch's: whole texts, masks with structure, decoding.

    python benchmarks/run.py native_attention

PyTorch's side is `scaled_dot_product_attention` as the "torch" backend calls it; "definition" is the readable one, with
its T x S table. Every pair of sides is first seen to give the same numbers. Memory is what one forward and backward
pass adds to the resident memory of this process.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Goal, added_memory, interleaved
from torch import Tensor

from minillm import ops

REPEATS, CALLS = 9, 20_000
WHOLE = {  # B, H, G, T, K, causal
    "causal, 512 tokens": (1, 8, 8, 512, 64, True),
    "causal, 1024 tokens": (1, 8, 8, 1024, 64, True),
    "causal, 4096 tokens": (1, 2, 2, 4096, 64, True),
    "causal, 512 tokens, 4 heads a key head, 128 features": (1, 8, 2, 512, 128, True),
    "not causal, 1024 tokens": (1, 8, 8, 1024, 64, False),
    "not causal, 16 rows of 128 tokens (BERT-tiny)": (16, 2, 2, 128, 64, False),
}
DECODE = {  # B, H, G, S, K
    "32 heads, 8 key heads, 2048 cached": (1, 32, 8, 2048, 64),
    "8 heads, 8 key heads, 2048 cached": (1, 8, 8, 2048, 64),
    "4 rows, 16 heads, 4 key heads, 1024 cached": (4, 16, 4, 1024, 64),
}
GROUPED, OWN, _ = DECODE
LENGTHS = (1024, 2048, 4096, 8192, 16384)

EQUAL = "with no key to leave out both do the same products, and runs differ by 3 %"
ALONE = "not proved: with one query for each key head nothing is shared, and both sides wait for the memory"

GOALS = [
    *(
        Goal(f"attention kernel, {name}: {passes} / torch", ("whole", name, passes), 1.0, note=EQUAL)
        for name in WHOLE
        for passes in ("forward", "both passes")
    ),
    Goal("attention kernel, causal, 1024 tokens: speed-up over the definition", ("definition", "forward"), 4.0, True),
    Goal("... forward and backward", ("definition", "both passes"), 2.5, True),
    Goal("attention kernel, half of the keys padding: speed-up over torch", ("masks", "padding"), 1.3, True),
    Goal("attention kernel, learned prefix of 16: speed-up over torch", ("masks", "prefix"), 1.3, True),
    Goal("attention kernel, window 256 of 2048: speed-up over torch", ("masks", "window"), 3.0, True),
    Goal("attention kernel, decode, 4 heads a key head: speed-up over torch", ("decode", GROUPED), 3.0, True),
    Goal("attention kernel, decode, own key heads: speed-up over torch", ("decode", OWN), 1.5, True, ALONE),
    Goal("rotary kernel, 16 x 1024 x 64: speed-up over torch", ("rope", "speedup"), 3.5, True),
    Goal("calling a kernel, microseconds", ("call", "microseconds"), 4.0),
    Goal("memory of attention, both passes, largest peak(2N) / peak(N)", ("memory", "largest ratio"), 2.1),
]


def tensors(B: int, H: int, G: int, T: int, S: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as projections leave them: (B, rows, heads, K) in memory."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, T, H, K), (B, S, G, K), (B, S, G, K))
    q, k, v = (torch.randn(size, generator=generator).transpose(1, 2).requires_grad_() for size in sizes)
    return q, k, v


def speedups(run: Callable[[], Tensor], leaves: tuple[Tensor, ...], other: str = "torch") -> dict[str, float]:
    """How many times the native backend's speed is that of `other`, forward alone and with the backward pass."""

    def forward(backend: str) -> Callable[[], Tensor]:
        def side() -> Tensor:
            with torch.no_grad(), ops.use_backend(backend):
                return run()

        return side

    def both(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def side() -> tuple[Tensor, ...]:
            with ops.use_backend(backend):
                y = run()
                return torch.autograd.grad(y, leaves, y.detach())

        return side

    torch.testing.assert_close(forward("native")(), forward(other)(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(both("native")(), both(other)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    return {"forward": ratio(forward("native"), forward(other)), "both passes": ratio(both("native"), both(other))}


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """Their median time over ours: above 1, ours is faster."""
    start = time.process_time()
    ours()
    inner = max(1, round(0.03 / max(1e-6, time.process_time() - start)))  # samples of some 30 ms
    samples = interleaved({"ours": ours, "theirs": theirs}, repeats=REPEATS, inner=inner)
    return round(statistics.median(samples["theirs"]) / statistics.median(samples["ours"]), 3)


def whole() -> dict[str, Any]:
    """Time against torch's, forward and with the backward pass."""
    results = {}
    for name, (B, H, G, T, K, causal) in WHOLE.items():
        leaves = tensors(B, H, G, T, T, K)
        faster = speedups(lambda leaves=leaves, causal=causal: ops.attention(*leaves, causal=causal), leaves)
        results[name] = {passes: round(1 / times, 3) for passes, times in faster.items()}
    return results


def masks() -> dict[str, float]:
    """Forward: each row of the batch has half of its keys for padding, on either side; a learned prefix; a window."""
    q, k, v = (x.detach() for x in tensors(8, 4, 4, 512, 512, 64))
    keep = torch.ones(8, 1, 1, 512, dtype=torch.bool)
    keep[:4, ..., 256:], keep[4:, ..., :256] = False, False
    prefix = tensors(4, 8, 8, 512, 528, 64)
    long = tensors(1, 4, 4, 2048, 2048, 64)
    runs = {
        "padding": (lambda: ops.attention(q, k, v, mask=keep), (q, k, v)),
        "prefix": (lambda: ops.attention(*prefix, causal=True), prefix),
        "window": (lambda: ops.attention(*long, causal=True, window=256), long),
    }
    return {
        name: speedups(run, tuple(x.requires_grad_() for x in leaves))["forward"]
        for name, (run, leaves) in runs.items()
    }


def decode() -> dict[str, float]:
    """One new token; keys and values are a cache's buffers, half filled."""
    results = {}
    for name, (B, H, G, S, K) in DECODE.items():
        q = torch.randn(B, H, 1, K)
        k, v = (torch.randn(B, G, 2 * S, K).narrow(2, 0, S) for _ in "kv")

        def side(backend: str, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with torch.no_grad(), ops.use_backend(backend):
                    return ops.attention(q, k, v, causal=True)

            return run

        torch.testing.assert_close(side("native")(), side("torch")())
        results[name] = ratio(side("native"), side("torch"))
    return results


def rope() -> dict[str, float]:
    x = tensors(1, 16, 16, 1024, 1, 64)[0].detach()
    table = ops.rotary_table(torch.arange(1024), 64)

    def side(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad(), ops.use_backend(backend):
                return ops.rope(x, *table)

        return run

    torch.testing.assert_close(side("native")(), side("torch")())
    return {"speedup": ratio(side("native"), side("torch"))}


def call() -> dict[str, float]:
    """Microseconds of a call that has next to nothing to do."""
    x, table = torch.randn(1, 1, 1, 16), ops.rotary_table(torch.arange(1), 16)
    with torch.inference_mode():
        samples = interleaved({"call": lambda: torch.ops.minillm.rope(x, *table)}, repeats=REPEATS, inner=CALLS)
    return {"microseconds": round(1e3 * statistics.median(samples["call"]), 2)}


def memory() -> dict[str, Any]:
    """MiB that both passes add over the inputs, for growing texts; twice the text should take twice as much."""
    trim = ctypes.CDLL(None).malloc_trim  # gives freed memory back, which the next peak would else hide behind
    peaks = {}
    for length in LENGTHS:
        leaves = tensors(1, 8, 8, length, length, 64)

        def both(leaves: tuple[Tensor, ...] = leaves) -> None:
            with ops.use_backend("native"):
                torch.autograd.grad(ops.attention(*leaves, causal=True).sum(), leaves)

        trim(0)
        peaks[length] = added_memory(both)
    ratios = [round(peaks[2 * n] / peaks[n], 3) for n in LENGTHS[:-1]]
    return {"peak_mib": peaks, "ratios": ratios, "largest ratio": max(ratios)}


def measure() -> dict[str, Any]:
    ops.use_backend("native")  # builds it now, if it is not yet
    ops.use_backend("torch")
    long = tensors(1, 8, 8, 1024, 1024, 64)
    return {
        "memory": memory(),  # first: freed memory of the others would hide what this adds
        "whole": whole(),
        "definition": speedups(lambda: ops.attention(*long, causal=True), long, "reference"),
        "masks": masks(),
        "decode": decode(),
        "rope": rope(),
        "call": call(),
    }
