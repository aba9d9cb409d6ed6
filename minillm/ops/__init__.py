"""Floor 0: the numerical operations, each a readable definition with faster implementations behind the same name."""

from minillm.ops.activations import ACTIVATIONS, swiglu
from minillm.ops.attention import attention, attention_weights, causal_mask
from minillm.ops.cross_entropy import IGNORE, linear_cross_entropy
from minillm.ops.lora import lora, lora_linear
from minillm.ops.norm import layer_norm, rms_norm
from minillm.ops.registry import OPS, Op, info, use_backend
from minillm.ops.rope import RopeScaling, rope, rotary_table

__all__ = [
    "ACTIVATIONS",
    "IGNORE",
    "OPS",
    "Op",
    "RopeScaling",
    "attention",
    "attention_weights",
    "causal_mask",
    "info",
    "layer_norm",
    "linear_cross_entropy",
    "lora",
    "lora_linear",
    "rms_norm",
    "rope",
    "rotary_table",
    "swiglu",
    "use_backend",
]
