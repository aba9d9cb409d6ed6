"""One training step (forward, backward, AdamW) of a tiny Llama, in full and by LoRA, against transformers and peft.

    python benchmarks/run.py training_step

Ours is what the Trainer runs: `causal_lm_loss` on a `Decoder`, `make_optimizer`, and `tune` for LoRA. The peer is
LlamaForCausalLM with the same weights and the same fused AdamW. Before the clock starts, losses and gradients agree.
"""

import sys
from collections.abc import Callable

import torch
from common import HEADS, LAYERS, TINY, Goal, added_memory, compare, compare_memory, hub_llama, hub_name, same_gradients
from torch import Tensor, nn

from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, tune
from minillm.training import TrainConfig, causal_lm_loss, make_optimizer

BATCH, LENGTH, RANK, ALPHA = 8, 256, 8, 16
TARGETS = {"lora": ("q_proj", "v_proj"), "lora_all": ("all-linear",)}  # all but the head, on both sides

GOALS = [
    Goal("full training step, time / transformers", ("full", "time_ratio"), 0.95),
    Goal("full training step, memory it adds / transformers", ("full", "memory_ratio"), 0.75),
    Goal(
        "LoRA (q, v, r=8) step, time / transformers + peft",
        ("lora", "time_ratio"),
        0.90,
        note="matrix products and attention, the same on both sides, are three quarters of the peer's time",
    ),
    Goal("LoRA (q, v, r=8) step, memory it adds / transformers + peft", ("lora", "memory_ratio"), 0.65),
    Goal("LoRA (all linear layers, r=8) step, time / transformers + peft", ("lora_all", "time_ratio"), 0.85),
    Goal("LoRA (all linear layers, r=8) step, memory it adds / the same", ("lora_all", "memory_ratio"), 0.65),
]


def ours(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(ModelConfig(num_layers=LAYERS, num_heads=HEADS, tie_embeddings=False, **TINY))
    if method in TARGETS:
        tune(model, LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[method]))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.02)  # as after some steps: at zero, A has no gradient
    return model


def theirs(method: str) -> nn.Module:
    import peft

    model = hub_llama(ours("full"), use_cache=False)
    if method in TARGETS:
        targets = "all-linear" if method == "lora_all" else list(TARGETS[method])
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        model = peft.get_peft_model(model, config)
        adapter = {peft_name(n): p for n, p in ours(method).named_parameters() if "lora_" in n}
        assert not model.load_state_dict(adapter, strict=False).unexpected_keys
    return model


def peft_name(name: str) -> str:
    return f"base_model.model.{hub_name(name)}.default.weight"


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(TINY["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def our_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return causal_lm_loss(model, data).value


def their_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return model(data["tokens"], labels=data["labels"], shift_labels=data["labels"]).loss  # our labels are shifted


def training_step(model: nn.Module, loss_of: Callable[[nn.Module, dict], Tensor]) -> Callable[[], None]:
    data, optimizer = batch(), make_optimizer(model.train(), TrainConfig(lr=1e-4))

    def step() -> None:
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def assert_equal(mine: nn.Module, peer: nn.Module, method: str) -> None:
    """Losses to 1e-5, gradients to 1e-3 of their norm: two float32 computations in different orders."""
    losses = our_loss(mine, batch()), their_loss(peer, batch())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    rename = peft_name if method in TARGETS else hub_name
    same_gradients(
        {rename(name): p.grad for name, p in mine.named_parameters() if p.requires_grad},
        {name: p.grad for name, p in peer.named_parameters() if p.requires_grad},
        tolerance=1e-3,
    )
    mine.zero_grad()
    peer.zero_grad()


def peak(side: str) -> float:
    """MiB over the built model in two steps of one side, such as "lora/minillm"; the second has AdamW's state."""
    method, name = side.split("/")
    step = training_step(ours(method), our_loss) if name == "minillm" else training_step(theirs(method), their_loss)
    return added_memory(lambda: (step(), step()))


def measure(repeats: int = 9) -> dict:
    result = {}
    for method in ("full", *TARGETS):
        mine, peer = ours(method), theirs(method)
        assert_equal(mine, peer, method)
        sides = {"minillm": training_step(mine, our_loss), "transformers": training_step(peer, their_loss)}
        result[method] = compare(sides, "minillm", "transformers", repeats=repeats)
        result[method] |= compare_memory(__file__, f"{method}/minillm", f"{method}/transformers")
    return result


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--memory"], "run it by: python benchmarks/run.py training_step"
    print(peak(sys.argv[2]))
