"""From a config to a model with random weights."""

from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder
from minillm.models.encoder import Encoder
from minillm.models.encoder_decoder import EncoderDecoder

Model = Decoder | Encoder | EncoderDecoder
MODELS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def build(config: ModelConfig) -> Model:
    """A new model of the kind that the config names, with random weights; decoders have their LM head."""
    return MODELS[config.kind](config)


def build_body(config: ModelConfig) -> Model:
    """The same without an LM head: hidden states for `models/heads` to read."""
    return Encoder(config) if config.kind == "encoder" else MODELS[config.kind](config, lm_head=False)
