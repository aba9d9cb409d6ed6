"""Which base an adapter belongs to."""

import hashlib

import torch
from torch import Tensor, nn

from minillm.peft.names import join, places
from minillm.peft.record import Tuning, tunings_of


def fingerprint(model: nn.Module, tuning: Tuning) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the weights and saved buffers that stay as they are in training.

    Those are the base's, but for what the adapter trains in place, and those of the adapters it stands on.
    """
    if tuning.fingerprint is not None:
        return tuning.fingerprint
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    originals = {
        (id(slot.module), slot.leaf): slot.before
        for other in reversed(tunings_of(model).values())
        for slot in other.slots
    }
    for name, _, module, adapter in places(model):
        if adapter:
            continue
        for leaf, parameter in module._parameters.items():
            parameter = originals.get((id(module), leaf), parameter)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                if join(name, leaf) not in tuning.plan.parameters:
                    named[join(name, leaf)] = parameter
        passing = module._non_persistent_buffers_set
        named |= {join(name, leaf): b for leaf, b in module.named_buffers(recurse=False) if leaf not in passing}
    for place, other in enumerate(tuning.under):  # by place, not by name: it may be loaded under another one
        named |= {f"{name}@{place}": p for name, p in tunings_of(model)[other].parameters().items()}
    return digest(named)


def digest(named: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
