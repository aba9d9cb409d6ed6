"""Greedy decoding of a tiny Llama against transformers' `generate`: the same weights, the same tokens.

    python benchmarks/run.py decode

16 prompt tokens, 128 new ones. The row "compiled" is ours with `model.hidden` compiled and static caches; compiling
takes about a minute before the clock starts, and a C++ compiler.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import HEADS, LAYERS, TINY, Goal, compare, hub_llama
from torch import Tensor

from minillm.generation import generate_tokens, static_cache
from minillm.models import Decoder, ModelConfig, build

PROMPT, NEW_TOKENS = 16, 128

GOALS = [
    Goal("greedy decode, batch 1, tokens/s / transformers", ("batch 1", "speedup"), 1.35, at_least=True),
    Goal("greedy decode, batch 16, tokens/s / transformers", ("batch 16", "speedup"), 1.1, at_least=True),
    Goal(
        "greedy decode, batch 1, compiled, tokens/s / transformers (stretch)",
        ("batch 1, compiled", "speedup"),
        2.5,
        at_least=True,
        note="with little overhead left, reading 27 MB of weights from memory for each token is most of the time",
    ),
]


def ours(kv_heads: int) -> Decoder:
    torch.manual_seed(0)
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": kv_heads, **TINY}
    return build(ModelConfig(tie_embeddings=False, init_std=0.1, **sizes)).eval()  # large weights: varied tokens


def compiled(model: Decoder) -> Callable[[Tensor], Tensor]:
    model.hidden = torch.compile(model.hidden)

    def run(tokens: Tensor) -> Tensor:
        cache = static_cache(model, len(tokens), PROMPT + NEW_TOKENS)
        return generate_tokens(model, tokens, max_new_tokens=NEW_TOKENS, cache=cache)

    return run


def decode(batch_size: int, kv_heads: int, run: Callable[[Tensor], Tensor], repeats: int) -> dict[str, Any]:
    """Time `run` and transformers on the same prompts, after both have produced the same tokens."""
    theirs = hub_llama(ours(kv_heads), eos_token_id=None, pad_token_id=0, use_cache=True).eval()
    tokens = torch.randint(1, TINY["vocab_size"], (batch_size, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    sides = {
        "minillm": lambda: run(tokens),
        "transformers": lambda: theirs.generate(tokens, use_cache=True, **options)[:, PROMPT:],
    }
    assert torch.equal(sides["minillm"](), sides["transformers"]()), "the two sides must produce the same tokens"
    result = compare(sides, "minillm", "transformers", repeats=repeats)
    return {**result, "speedup": round(result["cpu_ms"]["transformers"] / result["cpu_ms"]["minillm"], 3)}


def measure(repeats: int = 9) -> dict[str, Any]:
    def eager(model: Decoder) -> Callable[[Tensor], Tensor]:
        return lambda tokens: generate_tokens(model, tokens, max_new_tokens=NEW_TOKENS)

    return {
        "batch 1": decode(1, HEADS, eager(ours(HEADS)), repeats),
        "batch 1, 4 kv heads": decode(1, 4, eager(ours(4)), repeats),
        "batch 16": decode(16, HEADS, eager(ours(HEADS)), repeats),
        "batch 16, 4 kv heads": decode(16, 4, eager(ours(4)), repeats),
        "batch 1, compiled": decode(1, HEADS, compiled(ours(HEADS)), repeats),
    }
