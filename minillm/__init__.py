"""minillm: transformers and their parameter-efficient fine-tuning, from scratch, for learning and teaching."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.models import load, save_hf

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save_hf"]


def __getattr__(name: str) -> Any:
    """`minillm.load` and `minillm.save_hf`, imported when they are first asked for: importing minillm does no work."""
    if name in ("load", "save_hf"):
        from minillm import models

        return getattr(models, name)
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")
