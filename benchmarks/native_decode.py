"""Greedy decoding on our native kernels against transformers' `generate`: the same weights, the same tokens.

    python benchmarks/run.py native_decode

The tiny Llama of `decode`: 16 prompt tokens, 128 new ones, on one thread. Then with its linear layers in NF4, against
the float32 base, both on our kernels.
"""

from typing import Any

import torch
from common import HEADS, Goal, compare
from decode import NEW_TOKENS, PROMPT, TINY, decode, ours
from torch import Tensor

from minillm.generation import generate_tokens
from minillm.models import Decoder
from minillm.ops import use_backend
from minillm.peft.quantized_linear import quantize

PYTHON = "the kernels take a third of the time, the rest is Python between the small operations of a layer"
BOTH = "with 16 rows the library multiplies on both sides, and runs of this benchmark differ by a tenth"
SMALL = "not proved: of matrices this small little is read either way, and seven tensors of each go through Python"

GOALS = [
    Goal("greedy decode on kernels, batch 1, tokens/s / transformers", ("batch 1", "speedup"), 2.0, True, PYTHON),
    Goal("greedy decode on kernels, batch 1, 4 key heads", ("batch 1, 4 kv heads", "speedup"), 2.0, True, PYTHON),
    Goal("greedy decode on kernels, batch 16, tokens/s / transformers", ("batch 16", "speedup"), 1.1, True, BOTH),
    Goal("greedy decode of a base in NF4 on kernels, time / in float32", ("NF4", "time_ratio"), 1.0, note=SMALL),
]


def on_kernels(model: Decoder, tokens: Tensor) -> Tensor:
    with use_backend("auto"):
        return generate_tokens(model, tokens, max_new_tokens=NEW_TOKENS)


def in_nf4(repeats: int) -> dict[str, Any]:
    """The same model with its linear layers in 4 bits, against itself in float32."""
    base, small = ours(HEADS), ours(HEADS)
    quantize(small)
    tokens = torch.randint(1, TINY["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(1))
    sides = {"NF4": lambda: on_kernels(small, tokens), "float32": lambda: on_kernels(base, tokens)}
    return compare(sides, "NF4", "float32", repeats=repeats)


def measure(repeats: int = 9) -> dict[str, Any]:
    with use_backend("native"):  # builds it now, if it is not yet
        pass

    def side(model: Decoder) -> Any:
        return lambda tokens: on_kernels(model, tokens)

    return {
        "batch 1": decode(1, HEADS, side(ours(HEADS)), repeats),
        "batch 1, 4 kv heads": decode(1, 4, side(ours(4)), repeats),
        "batch 16": decode(16, HEADS, side(ours(HEADS)), repeats),
        "NF4": in_nf4(repeats),
    }
