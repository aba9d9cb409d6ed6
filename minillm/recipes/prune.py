"""Which entries of the biases `minillm tune method=pruned_bitfit` trains: the run finds them itself."""

import dataclasses
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from minillm.files import read_json, write_json
from minillm.peft import BiasScores, BitFitConfig, PrunedBitFitConfig, unload
from minillm.peft import tune as tune_model
from minillm.peft.names import DEFAULT
from minillm.recipes.common import say
from minillm.recipes.tasks import Task
from minillm.training import TrainConfig, is_main, world
from minillm.training.distributed import from_main, pick_device
from minillm.training.gradients import Gradients
from minillm.training.optimizer import make_optimizer
from minillm.training.randomness import seed_everything
from minillm.training.schedule import lr_at

KEPT_FILE = "kept.json"


@dataclass(frozen=True)
class PruneConfig:
    """All biases train for some steps, which are taken back; then those entries train that had mattered most."""

    keep: float = 0.25  # the share of the entries that train
    score_steps: int = 50  # of training all biases, before the run's own steps
    biases: tuple[str, ...] = ("all",)  # to choose among: all, half (queries and inner MLP layers), or ends of names
    create_missing: bool = False  # linear layers without a bias get one, zero at first
    trainable: tuple[str, ...] = ()  # modules that train in full beside them

    def __post_init__(self):
        wrong = [] if 0 < self.keep <= 1 else [f"keep={self.keep}: a share above 0, at most 1"]
        if self.score_steps < 2:  # before the first one nothing has moved
            wrong.append(f"score_steps={self.score_steps}: at least 2, and better as many as see the data once")
        if wrong:
            raise ValueError("; ".join(wrong))
        self.unpruned  # noqa: B018 (it refuses what names no biases)

    @property
    def unpruned(self) -> BitFitConfig:
        """The biases to choose among."""
        return BitFitConfig(self.biases, self.create_missing, trainable=self.trainable)


def choose_entries(task: Task, prune: PruneConfig, train: TrainConfig, run: Path, resume: bool) -> PrunedBitFitConfig:
    """The entries that the run trains, as `run/kept.json` has them, which a new run writes."""
    unpruned = task.method(prune.unpruned)
    if not resume:
        scores = _score(task, unpruned, train, prune.score_steps)
        chosen, vectors = scores.keep_entries(prune.keep), scores.vectors
        total = sum(len(entries) for entries in scores.entries.values())
        unload(task.model, DEFAULT)
        described = {"entries": total, "kept": dict(chosen.kept), "scores": vectors}
        from_main(lambda: write_json(run / KEPT_FILE, described))
        count = sum(len(places) for _, places in chosen.kept)
        say(f"{count:,} of {total:,} entries of biases are kept, in {len(chosen.kept)} of {len(vectors)} biases")
    saved = read_json(run / KEPT_FILE)
    kept = saved.get("kept") if isinstance(saved, dict) else None
    if not isinstance(kept, dict):
        raise ValueError(f"{run / KEPT_FILE}: expected the kept entries of each bias, not {saved!r}")
    return PrunedBitFitConfig(
        tuple((name, tuple(places)) for name, places in kept.items()), trainable=unpruned.trainable
    )


def _score(task: Task, unpruned: BitFitConfig, train: TrainConfig, steps: int) -> BiasScores:
    """Train all biases as the run would, in its order of the data, and score them at each step."""
    from tqdm import tqdm

    train, clip = dataclasses.replace(train, steps=steps, clip=0.0, compile=False), train.clip
    seed_everything(train.seed + world().rank)
    tune_model(task.model, unpruned)
    scores, optimizer, loader = BiasScores(task.model, DEFAULT), make_optimizer(task.model, train), task.loader()
    gradients = Gradients(task.model, task.loss_fn, pick_device(train.device), train)
    training = task.model.training
    task.model.train()
    for step in tqdm(range(steps), desc="scoring biases", unit="step", dynamic_ncols=True, disable=not is_main()):
        optimizer.zero_grad()
        gradients.scale_and_clip(gradients.compute(islice(loader, train.accumulate), False))
        scores.update()  # by the gradient as it is, so that no step counts for less
        if clip:
            torch.nn.utils.clip_grad_norm_(gradients.parameters, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, train)
        optimizer.step()
    optimizer.zero_grad()
    task.model.train(training)
    return scores
