"""Losses: functions of a model and a batch that return a `Loss`. Which one fits which model and data:

causal_lm_loss        Decoder                    the next token
masked_lm_loss        MaskedLM                   the hidden tokens
seq2seq_loss          EncoderDecoder             the target's next token
classification_loss   Classifier                 one of n classes        multi_label_loss, regression_loss
tagging_loss          Tagger                     a class for each token
span_loss             SpanExtractor              where an answer begins and ends
choice_loss           MultipleChoice             one of C candidates
contrastive_loss      SentenceEmbedder           sentences that belong together
DistillationLoss      any with hidden, lm_head   what a teacher says
"""

from minillm.training.losses.base import Loss
from minillm.training.losses.contrastive import contrastive_loss
from minillm.training.losses.distillation import DistillationLoss
from minillm.training.losses.labels import (
    choice_loss,
    classification_loss,
    multi_label_loss,
    regression_loss,
    span_loss,
    tagging_loss,
)
from minillm.training.losses.language_model import causal_lm_loss, masked_lm_loss, seq2seq_loss

__all__ = [
    "DistillationLoss",
    "Loss",
    "causal_lm_loss",
    "choice_loss",
    "classification_loss",
    "contrastive_loss",
    "masked_lm_loss",
    "multi_label_loss",
    "regression_loss",
    "seq2seq_loss",
    "span_loss",
    "tagging_loss",
]
