"""The keys of `minillm compare`."""

import math
from dataclasses import dataclass
from typing import Literal

from minillm.config import seed_flaw
from minillm.recipes.compare.rows import RATES


@dataclass(frozen=True)
class CompareConfig:
    """`minillm compare`: every method on one base and one task, under the same conditions.

    The rates are chosen by the score on valid, with a seed of their own; then each method trains anew with its rate and
    each reported seed, and only these runs see test.
    """

    base: str = ""  # one of minillm's own bases, such as tiny-encoder, or a run or model folder
    task: str = ""  # one of minillm's own tasks, such as sentiment, or a file or folder of records
    methods: tuple[str, ...] = ("all",)
    run: str = ""  # the study's folder; an unfinished study there goes on; when empty, runs/compare-<date>-<time>
    seeds: int = 5  # reported: initial weights, order of the data, dropout
    rates: int = RATES  # learning rates that each method may try; with 1 there is nothing to choose
    metric: str = ""  # of the task's; when empty, the first of them
    steps: int = 300
    batch_size: int = 16
    length: int = 64  # tokens of a text
    points: int = 8  # of the learning curve
    task_seed: int = 0  # of a generated task, and of how a file is cut into splits
    folder: str = ""  # where the files of a published task are
    train_records: int = 0  # at most so many, drawn by task_seed; 0: all
    valid_records: int = 0
    test_records: int = 0
    held_out: str = ""  # text whose loss shows what the base forgets; when empty, what the base's own run held out
    held_out_rows: int = 64  # of `length` tokens
    watts: float = 15.0  # of one busy core (or GPU): the energy is estimated as seconds times this
    keep_adapters: bool = False
    device: Literal["auto", "cpu", "cuda"] = "cpu"

    def __post_init__(self):
        least = {"seeds": 1, "steps": 1, "batch_size": 1, "length": 8, "points": 1, "held_out_rows": 1}
        least |= {"train_records": 0, "valid_records": 0, "test_records": 0}
        wrong = [f"{name}={getattr(self, name)}: at least {n}" for name, n in least.items() if getattr(self, name) < n]
        if not 1 <= self.rates <= RATES:
            wrong.append(f"rates={self.rates}: from 1 to {RATES}, as every method has so many to try")
        if not 0 < self.watts < math.inf:
            wrong.append(f"watts={self.watts}: a number above 0")
        wrong += seed_flaw(self.task_seed, "task_seed")
        if wrong:
            raise ValueError("this study cannot be done:\n  " + "\n  ".join(wrong))


def quick() -> CompareConfig:
    """`minillm compare --quick`: all methods with one seed and the likeliest rate of each.

    Less than five minutes on two cores with an encoder of 4 million parameters: a first look, no result.
    """
    sizes = {"train_records": 2000, "valid_records": 100, "test_records": 400, "held_out_rows": 32}
    return CompareConfig(seeds=1, rates=1, steps=80, points=3, **sizes)
