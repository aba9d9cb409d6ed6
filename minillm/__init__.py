"""minillm: transformers and their parameter-efficient fine-tuning, from scratch, for learning and teaching."""

from minillm.later import later

__version__ = "0.1.0"
__getattr__ = later(
    __name__,
    {
        "load": "models.loading",
        "load_hf_adapter": "finetune.hub_adapters",
        "save_hf": "models.families.save",
        "save_hf_adapter": "finetune.hub_adapters",
    },
)
__all__ = ["__version__", "load", "load_hf_adapter", "save_hf", "save_hf_adapter"]
