"""A small model with all that a trainer can get wrong (embedding, bias, norm, dropout, a frozen part), and its data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.training import Loss, TrainConfig, Trainer


class Toy(nn.Module):
    """Says the next of 13 tokens from the present one."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.up_proj = nn.Linear(8, 16)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(16)  # has persistent buffers
        self.lm_head = nn.Linear(16, 13)

    def forward(self, tokens):
        x = self.dropout(torch.tanh(self.up_proj(self.frozen(self.embed_tokens(tokens)))))
        return self.lm_head(self.norm(x.mT).mT)


def toy_loss(model, batch) -> Loss:
    labels = batch["labels"]
    logits = model(batch["tokens"])
    count = (labels != -100).sum()
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    hits = (logits.argmax(-1) == labels).sum()
    return Loss(total / count.clamp(min=1), count, {"accuracy": hits / count})


class ToyLoader:
    """Batch `index` is drawn from a generator of its own. `unequal`: the number of labels that count differs."""

    def __init__(self, rows: int = 4, unequal: bool = True):
        self.rows, self.unequal, self.index = rows, unequal, 0

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(self.index)
        self.index += 1
        tokens = torch.randint(13, (self.rows, 6), generator=generator)
        labels = (tokens * 5 + 1) % 13
        if self.unequal:
            labels[torch.rand(labels.shape, generator=generator) < torch.rand((), generator=generator)] = -100
            labels[0, 0] = 3
        return {"tokens": tokens, "labels": labels}

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


@pytest.fixture
def toy():
    return Toy


@pytest.fixture
def toy_loader():
    return ToyLoader


@pytest.fixture(name="toy_loss")
def _toy_loss():
    return toy_loss


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(folder name, dropout=, loader=, loss_fn=, model=, callbacks=, identity=, **TrainConfig fields)`."""

    def make(
        name="run", *, dropout=0.0, model=None, loader=None, loss_fn=toy_loss, callbacks=(), identity=None, **fields
    ):
        if model is None:
            torch.manual_seed(1)
            model = Toy(dropout)
        config = TrainConfig(**{"steps": 6, "lr": 0.01, "device": "cpu", "save_every": 2} | fields)
        return Trainer(model, loss_fn, loader or ToyLoader(), config, tmp_path / name, callbacks, identity)

    return make
