"""Libraries that only some metrics need: the extra `metrics`."""

import importlib
from types import ModuleType


def library(name: str) -> ModuleType:
    """The module `name`, imported only now; if it is not installed, one error says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise  # something in the library itself is broken
        raise ImportError(f'this metric needs {error.name}, which is missing: pip install "minillm[metrics]"') from None
