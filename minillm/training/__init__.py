"""Floor 4: the training loop. It knows a loss function and callbacks, not models and not metrics."""

from minillm.later import later
from minillm.training.callbacks import Callback, EarlyStopping, Evaluate, ProgressBar
from minillm.training.checkpoint import list_checkpoints, load_checkpoint
from minillm.training.config import TrainConfig
from minillm.training.distributed import World, is_main, process_group, world
from minillm.training.losses import (
    DistillationLoss,
    Loss,
    causal_lm_loss,
    choice_loss,
    classification_loss,
    contrastive_loss,
    masked_lm_loss,
    multi_label_loss,
    regression_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)
from minillm.training.optimizer import make_optimizer
from minillm.training.run_folder import Records, create_run_folder, read_run_config
from minillm.training.schedule import lr_at
from minillm.training.signals import Interrupted
from minillm.training.trainer import Trainer

__getattr__ = later(__name__, {"RankGrowth": "rank_growth"})

__all__ = [
    "Callback",
    "DistillationLoss",
    "EarlyStopping",
    "Evaluate",
    "Interrupted",
    "Loss",
    "ProgressBar",
    "RankGrowth",
    "Records",
    "TrainConfig",
    "Trainer",
    "World",
    "causal_lm_loss",
    "choice_loss",
    "classification_loss",
    "contrastive_loss",
    "create_run_folder",
    "is_main",
    "list_checkpoints",
    "load_checkpoint",
    "lr_at",
    "make_optimizer",
    "masked_lm_loss",
    "multi_label_loss",
    "process_group",
    "read_run_config",
    "regression_loss",
    "seq2seq_loss",
    "span_loss",
    "tagging_loss",
    "world",
]
