"""A run at one moment, taken out of a trainer and put back into one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minillm.config import to_dict
from minillm.training.checkpoint import Checkpoint
from minillm.training.distributed import gather, world
from minillm.training.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from minillm.training.trainer import Trainer

# What may differ when a run goes on: how long it shall be (from there on the schedule is the new length's), where it
# computes, what it writes. Anything else would be another run.
MAY_CHANGE = ("steps", "device", "compile", "gradient_checkpointing")
MAY_CHANGE += ("log_every", "eval_every", "save_every", "keep_checkpoints", "patience")


def take(trainer: "Trainer") -> Checkpoint:
    """All that must be saved. Under torchrun every process calls it: each has generators and a loader of its own."""
    processes = gather({"random": random_state(trainer.device), "loader": trainer.loader.state_dict()})
    return Checkpoint(
        tensors=saved_tensors(trainer.model),
        optimizer=trainer.optimizer.state_dict(),
        random=[process["random"] for process in processes],
        callbacks={
            f"{name}/{key}": tensor
            for name, callback in _with_state(trainer).items()
            for key, tensor in callback.tensors().items()
        },
        state=_facts(trainer)
        | {
            "step": trainer.step,
            "tokens": trainer.tokens,
            "records": trainer.metrics.count,
            "loaders": [process["loader"] for process in processes],
            "callbacks": {name: callback.state_dict() for name, callback in _with_state(trainer).items()},
        },
    )


def put_back(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Make the trainer what it was; ValueError, listing all that differs, if its run is another one."""
    _check_same_run(trainer, checkpoint)
    trainer.loader.load_state_dict(checkpoint.state["loaders"][world().rank])  # may refuse too, so before any change
    put_tensors(trainer.model, checkpoint.tensors)
    trainer.optimizer.load_state_dict(checkpoint.optimizer)
    for name, callback in _with_state(trainer).items():
        callback.load_state_dict(checkpoint.state["callbacks"][name])
        kept = checkpoint.callbacks.items()
        callback.load_tensors({key.partition("/")[2]: t for key, t in kept if key.startswith(f"{name}/")})
    set_random_state(checkpoint.random[world().rank], trainer.device)
    trainer.step, trainer.tokens = checkpoint.step, checkpoint.state["tokens"]


def check_records(trainer: "Trainer", checkpoint: Checkpoint | None) -> None:
    """ValueError if records that the checkpoint knows of are gone, or checkpoints that the records tell of."""
    records, path = trainer.metrics.read(), trainer.metrics.path
    if checkpoint is None:
        last = max((record["step"] for record in records), default=0)
        if 0 < trainer.config.save_every < last:  # the record of a step stands there before its checkpoint
            raise ValueError(
                f"{path} reaches step {last}, so checkpoints were saved every {trainer.config.save_every} steps, and "
                f"{trainer.run_dir} has none: put its checkpoints/ back, start a run in another folder, or delete "
                f"{path.name} to begin this one again from step 0"
            )
        return
    found = sum(record["step"] <= checkpoint.step for record in records)
    if found != checkpoint.state["records"]:
        raise ValueError(
            f"{path} holds {found} records up to step {checkpoint.step}, and {checkpoint.state['records']} were "
            "written: put back the file as it was, or start a run in another folder"
        )


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trainable is what is saved: parameters that require a gradient, and persistent buffers, by name."""
    persistent = model.state_dict().keys()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


@torch.no_grad()
def put_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy into the model what `saved_tensors` gave."""
    for name, tensor in saved_tensors(model).items():
        tensor.copy_(tensors[name])


def _facts(trainer: "Trainer") -> dict[str, Any]:
    """What must stay as it is from start to end of a run."""
    return {"config": to_dict(trainer.config), "identity": trainer.identity, "processes": world().size}


def _with_state(trainer: "Trainer") -> dict[str, Any]:
    """The callbacks that have something to remember; two of one class are told apart by their order."""
    named: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if callback.state_dict():
            name = type(callback).__name__
            named[name if name not in named else f"{name} {len(named) + 1}"] = callback
    return named


def _check_same_run(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    now, before = _facts(trainer), checkpoint.state
    fixed = {f"config: {name}": value for name, value in now["config"].items() if name not in MAY_CHANGE}
    pairs = [(name, value, before["config"].get(name.removeprefix("config: "))) for name, value in fixed.items()]
    names = sorted(now["identity"].keys() | before["identity"].keys())
    pairs += [(name, now["identity"].get(name), before["identity"].get(name)) for name in names]
    pairs += [("processes (torchrun --nproc_per_node)", now["processes"], before["processes"])]
    pairs += [("callbacks that keep a state", sorted(_with_state(trainer)), sorted(before["callbacks"]))]
    shapes, shapes_before = _shapes(saved_tensors(trainer.model)), _shapes(checkpoint.tensors)
    for name in sorted(shapes.keys() | shapes_before.keys()):
        pairs.append((name, shapes.get(name, "not trained"), shapes_before.get(name, "not trained")))
    wrong = [f"{name}: {value!r} now, {saved!r} then" for name, value, saved in pairs if value != saved]
    if trainer.config.steps < checkpoint.step:
        wrong.append(f"config: steps: {trainer.config.steps} now, but {checkpoint.step} are done")
    if wrong:
        raise ValueError(
            f"this is not the run that saved the checkpoint of step {checkpoint.step}:\n  " + "\n  ".join(wrong) + "\n"
            f"make it the same again (only {', '.join(MAY_CHANGE)} may change), or start a run in another folder"
        )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
