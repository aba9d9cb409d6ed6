"""Floor 2: tuning a few parameters of a model (PEFT). Works on any torch.nn.Module; knows no model of ours.

`METHODS` has every method by name; its config and layers are imported when they are first asked for.
"""

from minillm.later import later
from minillm.peft.in_place import FullConfig, PartialConfig
from minillm.peft.io import load_adapter, save_adapter
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_embedding import LoRAEmbedding
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.merge import merge, unmerge
from minillm.peft.method import AdapterConfig, CannotMerge, Method, num_parameters
from minillm.peft.methods import METHODS
from minillm.peft.names import Gate, Wrapper
from minillm.peft.record import tunings_of
from minillm.peft.replace import replace_modules, wrap_modules
from minillm.peft.switch import activate, unload
from minillm.peft.tune import Report, auxiliary_loss, flatten, tune

__getattr__ = later(
    __name__,
    {
        "Audit": "auditing",
        "BiasScores": "prune_bitfit",
        "BitFitConfig": "bitfit",
        "Bottleneck": "bottleneck",
        "BottleneckConfig": "bottleneck_config",
        "Combined": "combination",
        "Fusion": "fusion",
        "FusionConfig": "fusion",
        "IA3Linear": "ia3",
        "Ia3Config": "ia3",
        "IncreLoRALinear": "increlora_linear",
        "IncreLoraConfig": "increlora",
        "MoLALinear": "mola_linear",
        "MolaConfig": "mola",
        "PTuningConfig": "ptuning",
        "PrefixConfig": "prefix",
        "PromptConfig": "prompt",
        "PrunedBitFitConfig": "sparse_bias",
        "QALoRALinear": "qalora",
        "QLoraConfig": "qlora",
        "QaLoraConfig": "qalora",
        "QuantizedLinear": "quantized_linear",
        "RankAllocator": "increlora_allocator",
        "audit": "auditing",
        "combine": "combination",
        "deltas": "bitfit",
        "merge_errors": "qlora",
        "quantize": "quantized_linear",
        "rows": "mixed_batch",
    },
)

__all__ = [
    "METHODS",
    "AdapterConfig",
    "Audit",
    "BiasScores",
    "BitFitConfig",
    "Bottleneck",
    "BottleneckConfig",
    "CannotMerge",
    "Combined",
    "FullConfig",
    "Fusion",
    "FusionConfig",
    "Gate",
    "IA3Linear",
    "Ia3Config",
    "IncreLoRALinear",
    "IncreLoraConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "Method",
    "MoLALinear",
    "MolaConfig",
    "PTuningConfig",
    "PartialConfig",
    "PrefixConfig",
    "PromptConfig",
    "PrunedBitFitConfig",
    "QALoRALinear",
    "QLoraConfig",
    "QaLoraConfig",
    "QuantizedLinear",
    "RankAllocator",
    "Report",
    "Wrapper",
    "activate",
    "audit",
    "auxiliary_loss",
    "combine",
    "deltas",
    "flatten",
    "load_adapter",
    "merge",
    "merge_errors",
    "num_parameters",
    "quantize",
    "replace_modules",
    "rows",
    "save_adapter",
    "tune",
    "tunings_of",
    "unload",
    "unmerge",
    "wrap_modules",
]
