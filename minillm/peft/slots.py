"""Parameters of the base that an adapter trains: each adapter has copies of its own."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillm.peft.method import Method, Plan
from minillm.peft.names import join, places


@dataclasses.dataclass
class Slot:
    """A parameter of the base that an adapter has its own copy of."""

    name: str
    module: nn.Module
    leaf: str
    own: nn.Parameter
    before: nn.Parameter | None  # None: the base has no parameter there

    def put(self, own: bool) -> None:
        """Let the model hold the adapter's parameter, or the one from before."""
        new, there = self.own if own else self.before, self.module._parameters.get(self.leaf)
        if new is not None and there is not None:
            move(new, there.device, there.dtype)
        setattr(self.module, self.leaf, new)


def move(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Bring a tensor that was out of the model to where the model was moved in the meantime."""
    if (tensor.device, tensor.dtype) != (device, dtype):
        tensor.data = tensor.data.to(device, dtype)


def slots_of(model: nn.Module) -> dict[tuple[int, str], Slot]:
    """Every place of the base where a parameter stands, or could."""
    slots = {}
    for place in places(model):
        if not place.adapter:
            for leaf, parameter in place.module._parameters.items():
                slot = Slot(join(place.name, leaf), place.module, leaf, parameter, parameter)
                slots.setdefault((id(place.module), leaf), slot)
    return slots


Slots = Mapping[tuple[int, str], Slot]


def own_copies(config: Method, plan: Plan, stood: Slots, stands: Slots) -> list[Slot]:
    """Give an adapter its own copy of what it trains in place; where install has put one already, that is it.

    `stood` and `stands` are the slots before and after install. Where a parameter stands in several places that train
    together, such as a tied head, so does the copy.
    """
    names = {id(s.own): s.name for s in stands.values() if s.own is not None and s.name in plan.parameters}
    trained = {key: slot for key, slot in stands.items() if id(slot.own) in names}
    if not config.keeps_base:
        return [Slot(names[id(s.own)], s.module, s.leaf, s.own, s.own) for s in trained.values()]
    before = {id(slot.own) for slot in stood.values()}
    copies = {
        id(s.own): nn.Parameter(s.own.detach().clone()) if id(s.own) in before else s.own for s in trained.values()
    }
    own = []
    for key, slot in trained.items():
        moved = slot.own if id(slot.own) in before else None  # to a module that install made, such as a quantized one
        was = stood[key].own if key in stood else moved
        own.append(Slot(names[id(slot.own)], slot.module, slot.leaf, copies[id(slot.own)], was))
        own[-1].put(own=True)
    return own
