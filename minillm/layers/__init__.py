"""Floor 1: the layers of a transformer, each in its own short file."""

from minillm.later import later
from minillm.layers.attention import Attention, Rotation
from minillm.layers.block import Block
from minillm.layers.cache import KVCache, MemoryCache, StaticKVCache
from minillm.layers.mlp import MLP, MLPS, GatedMLP
from minillm.layers.norm import NORMS, LayerNorm, RMSNorm
from minillm.layers.positions import LearnedPositions, RelativePositions, SinusoidalPositions

__getattr__ = later(
    __name__,
    {
        "AdditiveAttention": "additive_attention",
        "CELLS": "cells",
        "LSTMCell": "cells",
        "RNNCell": "cells",
        "Recurrent": "recurrent",
        "State": "cells",
    },
)

__all__ = [
    "CELLS",
    "MLP",
    "MLPS",
    "NORMS",
    "AdditiveAttention",
    "Attention",
    "Block",
    "GatedMLP",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "LearnedPositions",
    "MemoryCache",
    "RMSNorm",
    "RNNCell",
    "Recurrent",
    "RelativePositions",
    "Rotation",
    "SinusoidalPositions",
    "State",
    "StaticKVCache",
]
