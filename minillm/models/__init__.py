"""Floor 2: models, built from the layers."""

from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder, build
from minillm.models.inspect import attention_maps, count_parameters
from minillm.models.io import load_model, save_model, weights_fingerprint

__all__ = [
    "Decoder",
    "ModelConfig",
    "attention_maps",
    "build",
    "count_parameters",
    "load_model",
    "save_model",
    "weights_fingerprint",
]
