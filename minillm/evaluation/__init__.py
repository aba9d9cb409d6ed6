"""Floor 5: what a model can do, what it costs, what it gets wrong."""

from minillm.evaluation.examples import evaluate
from minillm.evaluation.language_model import language_model_loss

__all__ = ["evaluate", "language_model_loss"]
