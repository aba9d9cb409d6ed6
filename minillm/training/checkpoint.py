"""Checkpoints: folders that are whole or absent, checked by SHA-256 before anything in them is used.

    checkpoints/step-000100/  model.safetensors  optimizer.pt  random.pt  state.json  checksums.json
                              callbacks.safetensors (where a callback keeps tensors, such as the best weights)

What is trainable is what is saved: a frozen base is never written again.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.files import atomic_folder, read_json, sha256_file, write_json

FORMAT = 2
FILES = ("model.safetensors", "optimizer.pt", "random.pt", "state.json")
CALLBACKS = "callbacks.safetensors"


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    tensors: dict[str, Tensor]  # trainable parameters and persistent buffers by name
    optimizer: dict[str, Any]
    random: list[dict[str, Any]]  # the generators of each process
    callbacks: dict[str, Tensor]  # tensors that callbacks keep: "EarlyStopping/lm_head.weight"
    state: dict[str, Any]  # plain values: step, tokens, config, identity, processes, loaders, callbacks

    @property
    def step(self) -> int:
        return self.state["step"]


def path_of(run_dir: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """Each checkpoint's step and folder, oldest first."""
    folders = (Path(run_dir) / "checkpoints").glob("step-*")
    steps = ((folder.name.removeprefix("step-"), folder) for folder in folders)
    return dict(sorted((int(step), folder) for step, folder in steps if step.isdecimal()))


def save_checkpoint(run_dir: str | Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. On any failure the older ones are untouched."""
    folder = path_of(run_dir, checkpoint.step)
    try:
        with atomic_folder(folder) as new:
            parts = {FILES[0]: checkpoint.tensors} | ({CALLBACKS: checkpoint.callbacks} if checkpoint.callbacks else {})
            for name, tensors in parts.items():
                save_file({key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()}, new / name)
            torch.save(checkpoint.optimizer, new / "optimizer.pt")
            torch.save(checkpoint.random, new / "random.pt")
            write_json(new / "state.json", {"format_version": FORMAT, **checkpoint.state})
            write_json(
                new / "checksums.json", {name: _fingerprint(new / name) for name in {**dict.fromkeys(FILES), **parts}}
            )
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a different error from each library
        free = shutil.disk_usage(folder.parent).free / 1e6 if folder.parent.exists() else 0
        raise OSError(
            f"the checkpoint of step {checkpoint.step} could not be saved in {folder.parent}, where {free:,.1f} MB are "
            f"free: {error}. Nothing half-written was left; {_newest(run_dir)}. If the disk is full, make room"
        ) from error
    delete_checkpoints(run_dir, list(list_checkpoints(run_dir))[:-keep])
    return folder


def load_checkpoint(run_dir: str | Path, step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint, or that of `step`; None if the run has none yet.

    Raises ValueError if it is damaged (naming the file, and the checkpoint before it that is whole), if there is none
    of `step`, or if another version of minillm wrote it.
    """
    found = list_checkpoints(run_dir)
    if step is None and not found:
        return None
    if step is not None and step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has those of {list(found) or 'no step'}")
    step = max(found) if step is None else step
    folder = found[step]
    if wrong := damage(folder):
        whole = [earlier for earlier in found if earlier < step and not damage(found[earlier])]
        advice = "no earlier one is whole: start the run anew in another folder"
        if whole:
            advice = (
                f"step {whole[-1]}'s is whole: delete the damaged folder and resume, to go on from there "
                f"(in Python also: resume(step={whole[-1]}))"
            )
        raise ValueError(f"the checkpoint {folder} is damaged:\n  " + "\n  ".join(wrong) + f"\n{advice}")
    state = read_json(folder / "state.json")
    if (version := state.pop("format_version", None)) != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format version {version} and this minillm reads version {FORMAT}: "
            "continue with the minillm named in the run's environment.json"
        )
    return Checkpoint(
        tensors=load_file(folder / FILES[0]),
        callbacks=load_file(folder / CALLBACKS) if (folder / CALLBACKS).is_file() else {},
        optimizer=torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"),
        random=torch.load(folder / "random.pt", weights_only=True, map_location="cpu"),
        state=state,
    )


def delete_checkpoints(run_dir: str | Path, steps: Iterable[int]) -> None:
    """Delete these steps' checkpoints, and what a killed process left half-written or half-deleted."""
    found = list_checkpoints(run_dir)
    for folder in (found[step] for step in steps):
        folder.rename(folder.with_name(f".old.{folder.name}"))  # one move, so that none is ever seen half-deleted
    for pattern in (".step-*", ".old.step-*"):
        for folder in (Path(run_dir) / "checkpoints").glob(pattern):
            shutil.rmtree(folder)


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty if they are as they were written."""
    try:
        expected = read_json(folder / "checksums.json")
        names = {**dict.fromkeys(FILES), **expected}
        return [line for name in names if (line := _difference(folder / name, expected[name]))]
    except (ValueError, LookupError, TypeError) as error:
        return [f"checksums.json cannot be used: {error!r}"]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _difference(path: Path, expected: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path.name} has {size} bytes; {expected['bytes']} were written"
    if (found := sha256_file(path)) != expected["sha256"]:
        return f"{path.name} has changed: its SHA-256 is {found[:12]}..., {expected['sha256'][:12]}... was written"
    return ""


def _newest(run_dir: str | Path) -> str:
    found = list_checkpoints(run_dir)
    return f"the newest checkpoint is {found[max(found)]}" if found else "there is no earlier checkpoint"
