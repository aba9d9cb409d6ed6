"""Decoding with a different LoRA adapter for each row, against one adapter for all rows and against peft.

    python benchmarks/run.py mixed_batch

A tiny Llama, 16 prompt tokens, adapters of rank 8 on the query and value projections. Entering and leaving `rows` is
timed, too. Before the clock starts, the mixed batch has produced what each row produces alone, and peft the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from common import HEADS, LAYERS, TINY, Goal, compare, hub_llama, hub_name
from torch import Tensor, nn

from minillm.generation import generate_tokens
from minillm.models import Decoder, ModelConfig, build
from minillm.peft import LoraConfig, activate, rows, tune, tunings_of

PROMPT, NEW_TOKENS = 16, 64
RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")
BATCH, MANY = 8, 64  # the second for the question what more adapters cost

GOALS = [
    Goal("decode, batch 8, 8 LoRA adapters, time / 1 adapter", ("8 adapters", "time_ratio"), 1.15),
    Goal("decode, batch 8, 8 LoRA adapters, time / peft", ("8 adapters, peft", "time_ratio"), 0.71),
    Goal("decode, batch 64, 64 LoRA adapters, time / 1 adapter", ("64 rows", "64 adapters", "time_ratio"), 1.25),
]


def ours(count: int) -> Decoder:
    """A decoder with adapters a0, a1, ..., none of them active; B is not zero, as after training."""
    torch.manual_seed(0)
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": HEADS, **TINY}
    model = build(ModelConfig(tie_embeddings=False, init_std=0.1, **sizes)).eval()  # large weights: varied tokens
    for name in names(count, count):
        tune(model, LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS), name)
        for parameter in tunings_of(model)[name].parameters().values():
            nn.init.normal_(parameter, std=0.1)
        activate(model)
    return model


def names(count: int, batch_size: int) -> list[str]:
    return [f"a{i % count}" for i in range(batch_size)]


def prompts(batch_size: int) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch_size, PROMPT), generator=torch.Generator().manual_seed(1))


def mixed(model: nn.Module, tokens: Tensor, adapters: list[str], new_tokens: int = NEW_TOKENS) -> Tensor:
    with rows(model, adapters):
        return generate_tokens(model, tokens, max_new_tokens=new_tokens)


def single(model: nn.Module, tokens: Tensor, adapter: str = "a0", new_tokens: int = NEW_TOKENS) -> Tensor:
    activate(model, adapter, train=())
    found = generate_tokens(model, tokens, max_new_tokens=new_tokens)
    activate(model)
    return found


def theirs(model: Decoder, count: int) -> Callable[[Tensor], Tensor]:
    """peft's mixed batch, on transformers' Llama with the same weights and adapters."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    base = hub_llama(model, eos_token_id=None, pad_token_id=0, use_cache=True).eval()
    peer = peft.PeftModel(base, config, adapter_name="a0")
    for name in names(count, count)[1:]:
        peer.add_adapter(name, config)
    adapters = {
        f"base_model.model.{hub_name(leaf)}.{name}.weight": parameter
        for name, tuning in tunings_of(model).items()
        for leaf, parameter in tuning.parameters().items()
    }
    assert not peer.load_state_dict(adapters, strict=False).unexpected_keys
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "adapter_names": names(count, BATCH)}
    peer.eval()
    return lambda tokens: peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, PROMPT:]


def more_adapters(repeats: int) -> dict[str, Any]:
    """64 rows with 1, 2, 4, ..., 64 different adapters, each against one adapter that all rows share."""
    model, tokens, result = ours(MANY), prompts(MANY), {}
    for count in (2**i for i in range(7)):
        sides = {
            "mixed": partial(mixed, model, tokens, names(count, MANY), 16),
            "one": partial(single, model, tokens, new_tokens=16),
        }
        result[f"{count} adapters"] = compare(sides, "mixed", "one", repeats=repeats)
    return result


def measure(repeats: int = 9) -> dict[str, Any]:
    model, tokens, adapters = ours(BATCH), prompts(BATCH), names(BATCH, BATCH)
    sides = {"mixed": partial(mixed, model, tokens, adapters), "one": partial(single, model, tokens)}
    peer = theirs(model, BATCH)
    alone = [single(model, tokens[i : i + 1], name) for i, name in enumerate(adapters)]
    assert torch.equal(sides["mixed"](), torch.cat(alone)), "a mixed batch must produce what its rows produce alone"
    assert torch.equal(sides["mixed"](), peer(tokens)), "the two sides must produce the same tokens"
    assert len({tuple(row[-8:].tolist()) for row in torch.cat(alone)}) == BATCH, "no two rows should say the same"
    return {
        "8 adapters": compare(sides, "mixed", "one", repeats=repeats),
        "8 adapters, peft": compare(
            {"minillm": sides["mixed"], "peft": lambda: peer(tokens)}, "minillm", "peft", repeats=repeats
        ),
        "64 rows": more_adapters(repeats),
    }
