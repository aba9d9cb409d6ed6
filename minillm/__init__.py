"""minillm: transformers and their parameter-efficient fine-tuning, from scratch, for learning and teaching."""

from minillm.later import later

__version__ = "0.1.0"
__getattr__ = later(__name__, {"load": "models.loading", "save_hf": "models.families.save"})
__all__ = ["__version__", "load", "save_hf"]
