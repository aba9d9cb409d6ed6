"""Floor 2: models, built from the layers."""

from minillm.models.build import build
from minillm.models.cards import CARDS, Card, find_card
from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder
from minillm.models.encoder import Encoder
from minillm.models.encoder_decoder import EncoderDecoder
from minillm.models.families.load import load_hf
from minillm.models.families.save import save_hf
from minillm.models.gradient_flow import gradient_flow
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
from minillm.models.loading import load
from minillm.models.memory import TrainingMemory, training_memory
from minillm.models.recurrent import RecurrentConfig, RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder
from minillm.models.size import ModelSize, model_size

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
