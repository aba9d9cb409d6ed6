"""Floor 2: tuning a few parameters of a model (PEFT). Works on any torch.nn.Module; knows no model of ours."""

from minillm.peft.audit import Audit, audit
from minillm.peft.in_place import FullConfig, PartialConfig
from minillm.peft.io import load_adapter, save_adapter
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.merge import merge, unmerge
from minillm.peft.method import Method
from minillm.peft.names import Wrapper
from minillm.peft.replace import replace_modules
from minillm.peft.tune import METHODS, Report, tune, unload

__all__ = [
    "METHODS",
    "Audit",
    "FullConfig",
    "LoRALinear",
    "LoraConfig",
    "Method",
    "PartialConfig",
    "Report",
    "Wrapper",
    "audit",
    "load_adapter",
    "merge",
    "replace_modules",
    "save_adapter",
    "tune",
    "unload",
    "unmerge",
]
