"""Names that a package offers but imports only when they are first asked for: importing minillm stays quick."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def later(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` (PEP 562) for `package`: name -> the module of the package that has it.

    Example, in minillm/models/__init__.py: `__getattr__ = later(__name__, {"load": "loading"})`
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    return get
