"""One name for each operation, several implementations behind it.

The first implementation of an op, `reference`, is its readable definition; the others must agree with it and only be
faster or leaner. `use_backend` chooses; `info` says which implementation runs each op and why a faster one does not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

BACKENDS = ("reference", "torch", "native")  # from the most readable to the fastest
OPS: dict[str, "Op"] = {}
_current = "torch"


class Op:
    """A function with one implementation per backend; calling it runs the one that the chosen backend names."""

    def __init__(self, reference: Callable):
        self.implementations = {"reference": reference}
        functools.update_wrapper(self, reference)
        OPS[reference.__name__] = self

    def implementation(self, backend: str) -> Callable[[Callable], Callable]:
        """Decorator: register a function as this op's implementation for `backend`."""
        assert backend in BACKENDS

        def register(function: Callable) -> Callable:
            self.implementations[backend] = function
            return function

        return register

    def __call__(self, *args, **kwargs):
        implementation = self.implementations.get(_current)
        if implementation is None:
            implementation = self.implementations["reference"]  # only "torch" may lack one: use_backend sees to it
        return implementation(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.__name__}: {', '.join(self.implementations)}>"


@contextlib.contextmanager
def _restore(previous: str) -> Iterator[None]:
    global _current
    try:
        yield
    finally:
        _current = previous


def use_backend(name: str) -> contextlib.AbstractContextManager:
    """Select the implementations that run from now on; as a context manager, only inside the `with` block.

    "reference": the definitions, for reading and checking. "torch" (the default): library calls; an op without one of
    its own uses its definition. "native": our C++/CUDA kernels; an op without a kernel is an error, never a silent
    fallback.
    """
    global _current
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "native" and (missing := [op for op in OPS if "native" not in OPS[op].implementations]):
        raise ValueError(
            f"the native backend cannot run: no kernel for {', '.join(missing)}. "
            "Use 'torch' (library calls) or 'reference' (the readable definitions)."
        )
    previous, _current = _current, name
    return _restore(previous)


def info() -> dict[str, dict[str, str]]:
    """For each op: the implementation that runs now, and for each faster backend the reason why it does not."""
    report = {}
    for name, op in OPS.items():
        runs = _current if _current in op.implementations else "reference"
        faster = {
            backend: "implemented, not selected" if backend in op.implementations else "not implemented"
            for backend in BACKENDS[BACKENDS.index(runs) + 1 :]
        }
        report[name] = {"runs": runs, **faster}
    return report
