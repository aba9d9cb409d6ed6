"""One LoRA linear layer, forward and backward, against peft's.

    python benchmarks/run.py lora_linear

The gradients are those of the adapters and of the input; the weight is frozen, as in a model that is being tuned.
"""

from functools import partial

import peft
import torch
from common import Goal, compare, same_gradients
from torch import Tensor, nn

from minillm.peft import LoRALinear

ROWS, RANK, ALPHA = 2048, 8, 16

GOALS = [
    Goal("one LoRA linear, d=256, r=8, time / peft", ("d=256", "time_ratio"), 0.80),
    Goal("one LoRA linear, d=1024, r=8, time / peft", ("d=1024", "time_ratio"), 0.90),
]


def layers(size: int) -> dict[str, nn.Module]:
    """The same layer three times: with our LoRA, with peft's, and frozen. B is not zero, as after a first step."""
    torch.manual_seed(0)
    base = nn.Linear(size, size, bias=False).requires_grad_(False)
    ours = LoRALinear(base, rank=RANK, alpha=ALPHA)
    nn.init.normal_(ours.lora_B, std=0.02)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    model.load_state_dict({"0.weight": base.weight})
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
    theirs = model.get_base_model()[0]
    theirs.load_state_dict({"lora_A.default.weight": ours.lora_A, "lora_B.default.weight": ours.lora_B}, strict=False)
    return {"minillm": ours, "peft": theirs, "frozen linear": base}


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x; those of the adapters are left in the layer."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).backward(grad)
    return x.grad


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    named = {"x": forward_backward(layer, x, grad)}
    trained = {name[:6]: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return named | trained  # lora_A and lora_B, whatever follows in peft's names


def measure(repeats: int = 15) -> dict:
    result = {}
    for size, inner in ((256, 10), (1024, 2)):
        x, grad = torch.randn(ROWS, size), torch.randn(ROWS, size)
        three = layers(size)
        same_gradients(gradients(three["minillm"], x, grad), gradients(three["peft"], x, grad), tolerance=1e-4)
        sides = {name: partial(forward_backward, layer, x, grad) for name, layer in three.items()}
        result[f"d={size}"] = compare(sides, "minillm", "peft", repeats=repeats, inner=inner)
    return result
