"""AdamW over what is trainable."""

import warnings

import torch
from torch import nn

from minillm.layers import LearnedPositions, RelativePositions
from minillm.training.config import TrainConfig

HALF = (torch.bfloat16, torch.float16)
TABLES = (nn.Embedding, LearnedPositions, RelativePositions)  # a row of theirs is used only where its index occurs


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the parameters that require a gradient, and no others.

    Weight decay falls on matrices: parameters of two or more dimensions that belong to no table of embeddings or
    positions. Not on biases and norms, whose size is no measure of complexity, and not on tables: a row is pulled to
    zero at each step but pushed back only when its word or place occurs. So did OLMo 2 (arXiv:2501.00656); GPT-2's line
    decays embeddings.
    A head that shares the embedding's weight counts as embedding.
    `fused` updates all parameters in one pass over memory, also on a CPU.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient; unfreeze some with requires_grad_(True), "
            "or add an adapter, before the trainer is made"
        )
    if half := sum(p.numel() for p in trainable if p.dtype in HALF):
        warnings.warn(
            f"{half:,} of the values to be trained are in half precision, which rounds away steps that are small "
            "beside a value: load the model with dtype=torch.float32, and compute with TrainConfig(precision="
            "'bfloat16') where float32 is slow",
            stacklevel=2,
        )
    embeddings = {id(p) for m in model.modules() if isinstance(m, TABLES) for p in m.parameters(recurse=False)}
    matrices = [p for p in trainable if p.dim() >= 2 and id(p) not in embeddings]
    decayed = {id(parameter) for parameter in matrices}
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
