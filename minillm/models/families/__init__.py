"""The Hub's model families as data, and the loading and saving that follows from it."""

from minillm.models.families.decoders import GPT2, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from minillm.models.families.encoders import BERT, CAMEMBERT, DISTILBERT, ROBERTA, XLM_ROBERTA
from minillm.models.families.family import Architecture, Family
from minillm.models.families.seq2seq import BART, MBART, T5, T5_GATED

FAMILIES = (
    LLAMA,
    GPT2,
    MISTRAL,
    QWEN2,
    QWEN3,
    PHI3,
    DISTILBERT,
    BERT,
    ROBERTA,
    CAMEMBERT,
    XLM_ROBERTA,
    T5,
    T5_GATED,
    BART,
    MBART,
)

__all__ = ["FAMILIES", "Architecture", "Family"]
