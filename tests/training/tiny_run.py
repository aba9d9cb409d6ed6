"""A tiny but whole run, alone or under torchrun, for the tests that kill it:

python tiny_run.py DATA RUN [--steps 12] [--dropout 0.2] [--resume] [--sigterm RANK STEP]
"""

import argparse
import os
import signal
from pathlib import Path

import torch

from minillm.data import Document, PackedLoader, TokenFile, sequential_batches, write_tokens
from minillm.evaluation import language_model_loss
from minillm.models import ModelConfig, build
from minillm.tokenizers import ByteTokenizer
from minillm.training import (
    Callback,
    EarlyStopping,
    Evaluate,
    TrainConfig,
    Trainer,
    causal_lm_loss,
    create_run_folder,
    process_group,
    world,
)


def write_data(folder: Path) -> None:
    """Prompts of many lengths, which do not count: so each batch has another number of labels."""
    texts = [(f"What is {n} times {n}? " * (1 + n % 5), f"It is {n * n}.") for n in range(60)]
    write_tokens([Document(str(n), *text) for n, text in enumerate(texts)], ByteTokenizer(), folder)


class Sigterm(Callback):
    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step(self, trainer, record):
        if (world().rank, record["step"]) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGTERM)


def train(data: Path, run: Path, *, steps=12, dropout=0.2, resume=False, sigterm=None) -> Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, here = TokenFile.open(data), world()
    model = build(
        ModelConfig(vocab_size=259, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, dropout=dropout)
    )
    loader = PackedLoader(tokens, 6, 32, rank=here.rank, world_size=here.size, random_offset=True)
    config = TrainConfig(
        steps=steps, lr=0.01, accumulate=2, device="cpu", save_every=2, eval_every=3, patience=99, clip=0.5
    )
    callbacks = [
        Evaluate(lambda model: language_model_loss(model, sequential_batches(tokens, 16, 32))),
        EarlyStopping(),
        *([Sigterm(*sigterm)] if sigterm else []),
    ]
    trainer = Trainer(
        model, causal_lm_loss, loader, config, run, callbacks, {"tokenizer": tokens.meta.tokenizer_fingerprint}
    )
    if resume:
        trainer.resume()
    else:
        create_run_folder(run, {"steps": steps})
    trainer.fit()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--sigterm", type=int, nargs=2)
    with process_group("cpu"):
        train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
