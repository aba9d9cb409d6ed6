"""One name for each operation, several implementations behind it.

The first implementation of an op, `reference`, is its readable definition; the others must agree with it and only be
faster or leaner. `use_backend` chooses; `info` says which implementation runs each op and why a faster one does not.
"""

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

BACKENDS = ("reference", "torch", "native")  # from the most readable to the fastest
CHOICES = ("auto", *BACKENDS)
OPS: dict[str, "Op"] = {}
_module: ModuleType | None = None
_current = os.environ.get("MINILLM_BACKEND", "auto")
if _current not in CHOICES:
    raise ValueError(f"MINILLM_BACKEND={_current}: choose one of {', '.join(CHOICES)}")


@dataclass(frozen=True)
class Kernel:
    """A native implementation, which need not take every call."""

    run: Callable
    cannot: Callable[..., str]  # why it cannot take a call with these arguments; "" if it can
    slower: Callable[..., str]  # why "auto" leaves such a call to torch although it could; "" if it does not


class Op:
    """A function with one implementation per backend; calling it runs the one that the chosen backend names."""

    def __init__(self, reference: Callable):
        self.implementations = {"reference": reference}
        self.kernel: Kernel | None = None
        self.refused: Counter[str] = Counter()  # why calls that could have been native were not, and how many
        functools.update_wrapper(self, reference)
        OPS[reference.__name__] = self

    def implementation(self, backend: str) -> Callable[[Callable], Callable]:
        """Decorator: register a function as this op's implementation for `backend`, "reference" or "torch"."""
        assert backend in ("reference", "torch")

        def register(function: Callable) -> Callable:
            self.implementations[backend] = function
            return function

        return register

    def native(
        self, cannot: Callable[..., str], slower: Callable[..., str] = lambda *_, **__: ""
    ) -> Callable[[Callable], Callable]:
        """Decorator: register a function that runs our kernel. `cannot` and `slower` get the call's arguments."""

        def register(function: Callable) -> Callable:
            self.kernel = Kernel(function, cannot, slower)
            return function

        return register

    def __call__(self, *args, **kwargs):
        if _current in ("auto", "native") and self._takes(args, kwargs):
            return self.kernel.run(*args, **kwargs)
        return self.definition(_current)(*args, **kwargs)

    def definition(self, backend: str) -> Callable:
        """What runs in PyTorch for this backend: library calls where there are, else the definition itself."""
        reference = self.implementations["reference"]
        return reference if backend == "reference" else self.implementations.get("torch", reference)

    def runs_natively(self, *args, **kwargs) -> bool:
        """Whether a call with these arguments would run our kernel now."""
        if _current not in ("auto", "native") or not _native().loaded() or self.kernel is None:
            return False
        return not (self.kernel.cannot(*args, **kwargs) or (_current == "auto" and self.kernel.slower(*args, **kwargs)))

    def _takes(self, args: tuple, kwargs: dict) -> bool:
        """Whether our kernel runs this call. Where "native" was asked for and it cannot, an error says why."""
        if not _native().loaded():
            if _current == "auto":
                return False
            _native().load_or_build()
        if self.kernel is None:
            return False
        reason = self.kernel.cannot(*args, **kwargs)
        if reason and _current == "native":
            raise ValueError(
                f"{self.__name__}: the native kernel cannot run this call: {reason}. "
                'Use use_backend("auto"), which then takes torch\'s, or change the call.'
            )
        if not reason and _current == "auto":
            reason = self.kernel.slower(*args, **kwargs)
        if reason and not torch.compiler.is_compiling():
            self.refused[reason] += 1
        return not reason

    def __repr__(self) -> str:
        return f"<op {self.__name__}: {', '.join(self.implementations)}{', native' if self.kernel else ''}>"


def _native() -> ModuleType:
    """minillm.ops.native, imported when the first op is called: it needs more than the ops themselves do."""
    global _module
    if _module is None:
        from minillm.ops import native

        _module = native
    return _module


@contextlib.contextmanager
def _restore(previous: str) -> Iterator[None]:
    global _current
    try:
        yield
    finally:
        _current = previous


def use_backend(name: str) -> contextlib.AbstractContextManager:
    """Select the implementations that run from now on; as a context manager, only inside the `with` block.

    "auto" (the default; the environment variable MINILLM_BACKEND names another): our C++/CUDA kernels where they are
    built, can run a call and are faster, else PyTorch's library calls. "reference": the definitions, for reading and
    checking. "torch": library calls; an op without one of its own uses its definition. "native": our kernels, built
    now if they are not yet; a call that a kernel cannot take is an error, never a silent fallback. Ops of which we
    have no kernel run as with "torch".
    """
    global _current
    if name not in CHOICES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(CHOICES)}")
    if name == "native":
        _native().load_or_build()
    previous, _current = _current, name
    return _restore(previous)


def info() -> dict[str, dict[str, str]]:
    """For each op: the implementation that runs now, and for each faster one the reason why it does not.

    Where kernels run, "torch" counts the calls so far that they left to torch, and why.
    """
    missing = _native().missing()
    report = {}
    for name, op in OPS.items():
        has_torch = "torch" in op.implementations
        runs = "torch" if has_torch and _current != "reference" else "reference"
        entry = {}
        if op.kernel is None:
            entry["native"] = "no kernel of ours: PyTorch's operations run"
        elif _current in ("reference", "torch"):
            entry["native"] = f"not selected: the backend is {_current!r}" + (f"; and {missing}" if missing else "")
        elif missing:
            entry["native"] = missing
        else:
            runs = "native"
            if op.refused:
                entry["torch"] = "; ".join(f"{n} calls: {why}" for why, n in op.refused.most_common())
        if _current == "reference" and has_torch:
            entry["torch"] = "not selected: the backend is 'reference'"
        report[name] = {"runs": runs, **entry}
    return report
