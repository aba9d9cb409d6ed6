"""Where NaN and infinity come from: the first module whose output was not finite, and the likely cause."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def first_nonfinite(model: nn.Module, run: Callable[[], object]) -> str:
    """Call `run` (one forward of `model`) again, watching every module; say which one broke first and why, in words.

    Costs a hook on every module, so it is for after the failure, not for the way there.
    """
    with _watch(model) as found:
        run()
    if not found:
        return "a second run of the same input gave finite outputs in every module: the computation is not repeatable"
    name, module, inputs = found[0]
    where = f"the first module with an output that is not finite is {name} ({type(module).__name__})"
    broken = [
        f"{n} ({(~p.isfinite()).sum().item()} of {p.numel()})" for n, p in module.named_parameters() if not _finite(p)
    ]
    if broken:
        return (
            f"{where}: its parameters hold NaN or infinity themselves: {', '.join(broken)}. Likely cause: training "
            "diverged before the weights were saved (see loss and gradient norm in its metrics), or the file is "
            "damaged. Load an earlier checkpoint."
        )
    if not all(_finite(x) for x in inputs):
        return (
            f"{where}: its parameters are finite, but its input was not. Likely cause: an overflow in the operation "
            "before it (attention, activation or position vectors). Run in float32 or bfloat16, or scale the weights."
        )
    dtype = next((p.dtype for p in module.parameters()), None)
    return (
        f"{where}: its parameters and its input are finite, so the result overflowed"
        f"{f' {dtype}' if dtype else ''}. Likely cause: weights or activations too large. Run in float32 or bfloat16, "
        "or lower the learning rate that made them."
    )


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[tuple[str, nn.Module, tuple]]]:
    """Inside the block, modules with a non-finite output are appended to the list in the order in which they ran."""
    found: list[tuple[str, nn.Module, tuple]] = []

    def hook(name: str) -> Callable:
        def check(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and not _finite(output):
                found.append((name, module, inputs))

        return check

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(x: object) -> bool:
    return not isinstance(x, Tensor) or bool(x.isfinite().all())
