"""Does the training that is about to start train what it should? One step on a copy, parameter by parameter."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.diagnose import Probe, diagnose
from minillm.peft.linears import coded_values
from minillm.peft.names import collapse, original_parameters, pattern

REENTRANT = "None of the inputs have requires_grad"  # torch warns so when a checkpointed block will give no gradient
PARTNERS = (  # end of a parameter's name, and of the one that keeps its gradient at 0 while it is 0 itself
    ("lora_A", "lora_B"),
    ("router", "lora_B"),
    ("lora_embedding_B", "lora_embedding_A"),
    ("down.weight", "up.weight"),
    ("down.bias", "up.weight"),
)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What one step did to every parameter; `diagnoses` names what is wrong, `str()` is the table."""

    probes: tuple[Probe, ...]
    loss: float
    diagnoses: tuple[str, ...]
    coded: int = 0  # weights that are codes, not parameters

    def groups(self) -> list[tuple[str, list[Probe]]]:
        """Parameters of one kind in all layers, as long as the same can be said of them; under a shortened name."""
        groups: dict[tuple, list[Probe]] = {}
        for p in self.probes:
            key = (pattern(p.name), p.dtype, p.trainable, p.gradient, p.changed, p.in_optimizer)
            groups.setdefault(key, []).append(p)
        return [(", ".join(collapse(p.name for p in group)), group) for group in groups.values()]

    def __str__(self) -> str:
        answer = {True: "yes", False: "no", None: "-"}
        rows = [("parameters", "values", "dtype", "bytes", "trains", "gradient", "changes", "in optimizer")]
        for name, group in self.groups():
            p, count, size = group[0], sum(p.count for p in group), sum(p.bytes for p in group)
            facts = (answer[p.trainable], p.gradient, answer[p.changed], answer[p.in_optimizer])
            rows.append((name, f"{count:,}", str(p.dtype).removeprefix("torch."), f"{size:,}", *facts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        trained, total = (
            sum(p.count for p in self.probes if p.trainable),
            sum(p.count for p in self.probes) + self.coded,
        )
        lines.append(f"{trained:,} of {total:,} values train; loss {self.loss:.4f}")
        if any(p.gradient == "B = 0" for p in self.probes):
            lines.append(
                '"B = 0": what comes next starts as 0, as a LoRA\'s B does, so this gradient is exactly 0 in the first '
                "step: no fault"
            )
        return "\n".join([*lines, *(f"! {diagnosis}" for diagnosis in self.diagnoses)])


def audit(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> Audit:
    """Do one training step on a copy of model and optimizer and say what it did to every parameter.

    The model, its gradients, the optimizer and torch's random state stay as they are; a second copy needs its memory.
    `loss_fn(model, batch)` returns an object whose `.value` is the loss, a scalar. It must use the model it is given:
    through another reference it would reach the original. Without an optimizer AdamW steps over all that trains.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        twin, stepper = copy.deepcopy((model, optimizer))  # together, so that the copies belong together
        parameters = original_parameters(twin)
        for parameter in parameters.values():
            parameter.grad = None
        trainable = [p for p in parameters.values() if p.requires_grad]
        if stepper is None and trainable:
            stepper = torch.optim.AdamW(trainable, weight_decay=0.0)  # decay would move also what gets no gradient
        before = {name: p.detach().clone() for name, p in parameters.items()}
        loss, cut = _loss_and_gradients(twin, batch, loss_fn)
        gradients = {name: _gradient(name, p, parameters) for name, p in parameters.items()}
        if stepper is not None:
            stepper.step()
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else None
    probes = tuple(
        Probe(
            name,
            before[name].dtype,
            parameter.numel(),
            parameter.requires_grad,
            gradients[name],
            not torch.equal(before[name], parameters[name].detach()),
            None if stepped is None else id(parameter) in stepped,
        )
        for name, parameter in original_parameters(model).items()
    )
    return Audit(probes, loss, tuple(diagnose(model, probes, loss, cut)), coded_values(model))


def _loss_and_gradients(model: nn.Module, batch: Any, loss_fn: Callable) -> tuple[float, bool]:
    """The loss, after its backward; and whether reentrant checkpointing cut the way to a frozen input."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = _value(loss_fn(model, batch))
        if loss.requires_grad:
            loss.backward()
    cut = [w for w in caught if REENTRANT in str(w.message)]
    for warning in caught:
        if warning not in cut:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return loss.item(), bool(cut)


def _value(returned: Any) -> Tensor:
    value = getattr(returned, "value", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"the loss function returned a {type(returned).__name__} without a scalar tensor as .value. Write: "
            "return Loss(value, weight), with the mean as value and as weight the number of tokens or examples that it "
            "is a mean over (from minillm.training import Loss)"
        )
    return value


def _gradient(name: str, parameter: Tensor, parameters: dict[str, nn.Parameter]) -> str:
    if not parameter.requires_grad:
        return "-"
    if parameter.grad is None:
        return "none"
    if parameter.grad.count_nonzero():
        return "yes"
    own, at, adapter = name.partition("@")
    for end, partner in PARTNERS:
        other = parameters.get(own.removesuffix(end) + partner + at + adapter) if own.endswith(end) else None
        if other is not None and not other.count_nonzero():
            return "B = 0"
    return "zero"
