"""Floor 2: models, built from the layers."""

from minillm.later import later
from minillm.models.build import build
from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder
from minillm.models.encoder import Encoder
from minillm.models.encoder_decoder import EncoderDecoder
from minillm.models.heads import (
    HEADS,
    Classifier,
    Head,
    HeadConfig,
    MaskedLM,
    MultipleChoice,
    SentenceEmbedder,
    SpanExtractor,
    Tagger,
    build_with_head,
    put_head,
)
from minillm.models.inspect import attention_maps, count_parameters
from minillm.models.io import load_model, save_model, weights_fingerprint

__getattr__ = later(
    __name__,
    {
        "CARDS": "cards",
        "Card": "cards",
        "ModelSize": "size",
        "RecurrentConfig": "recurrent",
        "RecurrentEncoderDecoder": "recurrent_seq2seq",
        "RecurrentLM": "recurrent",
        "TrainingMemory": "memory",
        "find_card": "cards",
        "gradient_flow": "gradient_flow",
        "load": "loading",
        "load_hf": "families.load",
        "model_size": "size",
        "save_hf": "families.save",
        "training_memory": "memory",
    },
)

__all__ = [
    "CARDS",
    "HEADS",
    "Card",
    "Classifier",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "Head",
    "HeadConfig",
    "MaskedLM",
    "ModelConfig",
    "ModelSize",
    "MultipleChoice",
    "RecurrentConfig",
    "RecurrentEncoderDecoder",
    "RecurrentLM",
    "SentenceEmbedder",
    "SpanExtractor",
    "Tagger",
    "TrainingMemory",
    "attention_maps",
    "build",
    "build_with_head",
    "count_parameters",
    "find_card",
    "gradient_flow",
    "load",
    "load_hf",
    "load_model",
    "model_size",
    "put_head",
    "save_hf",
    "save_model",
    "training_memory",
    "weights_fingerprint",
]
