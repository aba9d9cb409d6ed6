"""Floor 2: tuning a few parameters of a model (PEFT). Works on any torch.nn.Module; knows no model of ours."""

from minillm.peft.audit import Audit, audit
from minillm.peft.in_place import FullConfig, PartialConfig
from minillm.peft.io import load_adapter, save_adapter
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_embedding import LoRAEmbedding
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.merge import merge, unmerge
from minillm.peft.method import AdapterConfig, CannotMerge, Method, num_parameters
from minillm.peft.names import Gate, Wrapper
from minillm.peft.record import tunings_of
from minillm.peft.replace import replace_modules, wrap_modules
from minillm.peft.tune import METHODS, Report, activate, auxiliary_loss, tune, unload

__all__ = [
    "METHODS",
    "AdapterConfig",
    "Audit",
    "CannotMerge",
    "FullConfig",
    "Gate",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "Method",
    "PartialConfig",
    "Report",
    "Wrapper",
    "activate",
    "audit",
    "auxiliary_loss",
    "load_adapter",
    "merge",
    "num_parameters",
    "replace_modules",
    "save_adapter",
    "tune",
    "tunings_of",
    "unload",
    "unmerge",
    "wrap_modules",
]
