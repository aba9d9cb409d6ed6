"""The models that come with minillm: in an installed package beside this file, in a checkout under `data/`."""

import os
from pathlib import Path

from minillm.config import nearest

_HERE = Path(__file__).resolve().parent


def models_folder() -> Path:
    """Where the shipped models are: the package's own folder, or in a checkout data/models."""
    inside = _HERE / "models"
    return inside if inside.is_dir() else _HERE.parents[1] / "data" / "models"


def shipped_models() -> list[str]:
    """The names of the shipped models; none where minillm came without them."""
    folder = models_folder()
    return sorted(entry.parent.name for entry in folder.glob("*/model.safetensors")) if folder.is_dir() else []


def find_shipped(name: str | Path) -> Path:
    """The folder of the shipped model `name`; whatever is no such name is returned as it is, as a path.

    ValueError for a name that also is a folder here: which one is meant must be said.
    """
    path = Path(name)
    if str(name) != path.name or path.name not in shipped_models():
        return path
    shipped = models_folder() / path.name
    if path.exists() and path.resolve() != shipped:
        raise ValueError(
            f"{name} is a model that minillm ships, and also here, in {os.getcwd()}: say which one with its whole "
            f"path, {shipped} or {path.resolve()}"
        )
    return shipped


def shipped_name(folder: str | Path) -> str | None:
    """The name of the shipped model in `folder`, or None if it holds another one."""
    path = Path(folder).resolve()
    return path.name if path.parent == models_folder() and path.name in shipped_models() else None


def near_shipped(name: str | Path) -> str:
    """What to add to "there is no model NAME": the nearest of the shipped ones."""
    names = shipped_models()
    if not names or str(name) != Path(name).name:
        return ""
    return f"; minillm ships models too: did you mean {nearest(str(name), names)}?"
