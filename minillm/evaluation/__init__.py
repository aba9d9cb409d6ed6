"""Floor 5: what a model can do, what it costs, what it gets wrong."""

from minillm.evaluation.examples import evaluate
from minillm.evaluation.language_model import language_model_loss
from minillm.evaluation.metrics import METRICS, find_metric
from minillm.evaluation.statistics import (
    bootstrap,
    bootstrap_metric,
    over_seeds,
    paired_bootstrap,
    paired_bootstrap_metric,
)
from minillm.evaluation.stereotypes import stereotype_scores

__all__ = [
    "METRICS",
    "bootstrap",
    "bootstrap_metric",
    "evaluate",
    "find_metric",
    "language_model_loss",
    "over_seeds",
    "paired_bootstrap",
    "paired_bootstrap_metric",
    "stereotype_scores",
]
