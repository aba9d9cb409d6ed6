"""Floor 0: the numerical operations, each a readable definition with faster implementations behind the same name."""

from minillm.later import later
from minillm.ops.activations import ACTIVATIONS, swiglu
from minillm.ops.attention import attention, attention_weights, causal_mask
from minillm.ops.cross_entropy import IGNORE, linear_cross_entropy
from minillm.ops.dropout import dropout, dropout_seed
from minillm.ops.linear import linear
from minillm.ops.lora import lora, lora_linear
from minillm.ops.lora_gather import lora_gather, lora_rows, lora_segments
from minillm.ops.norm import layer_norm, rms_norm
from minillm.ops.registry import OPS, Op, info, use_backend
from minillm.ops.rope import RopeScaling, rope, rotary_table

__getattr__ = later(
    __name__,
    {
        "Int4Tensor": "int4",
        "QuantTensor": "quantize",
        "quantize_int4": "int4",
        "quantize_nf4": "quantize",
        "quantized_linear": "quantized",
        "use_attention_stage": "native_attention",
    },
)

__all__ = [
    "ACTIVATIONS",
    "IGNORE",
    "OPS",
    "Int4Tensor",
    "Op",
    "QuantTensor",
    "RopeScaling",
    "attention",
    "attention_weights",
    "causal_mask",
    "dropout",
    "dropout_seed",
    "info",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora",
    "lora_gather",
    "lora_linear",
    "lora_rows",
    "lora_segments",
    "quantize_int4",
    "quantize_nf4",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rotary_table",
    "swiglu",
    "use_attention_stage",
    "use_backend",
]
