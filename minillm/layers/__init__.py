"""Floor 1: the layers of a transformer, each in its own short file."""

from minillm.layers.attention import Attention, Rotation
from minillm.layers.block import Block
from minillm.layers.cache import KVCache, StaticKVCache
from minillm.layers.mlp import MLP, MLPS, GatedMLP
from minillm.layers.norm import NORMS, LayerNorm, RMSNorm
from minillm.layers.positions import LearnedPositions, SinusoidalPositions

__all__ = [
    "MLP",
    "MLPS",
    "NORMS",
    "Attention",
    "Block",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "LearnedPositions",
    "RMSNorm",
    "Rotation",
    "SinusoidalPositions",
    "StaticKVCache",
]
