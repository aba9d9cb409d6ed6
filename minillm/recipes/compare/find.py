"""The base and the task that a command names."""

from pathlib import Path

from minillm.data.tasks import Task
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.locate import Loaded, load_base, locate


def find_base(name: str) -> tuple[Loaded, Path]:
    """The base, loaded, and its model's folder."""
    if not name:
        raise ValueError("base: which model? For example base=tiny-encoder, or a run or model folder")
    try:
        kind, folder = locate(name)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    if kind == "adapter":
        raise ValueError(f"base={name} is an adapter, and every method starts from a whole model: name its base")
    return load_base(folder, writes=False), folder


def find_task(config: CompareConfig) -> Task:
    """The task that the config names: one of minillm's own, or the records in a file or folder of the user's."""
    if not config.task:
        raise ValueError("task: which? One of minillm's own, such as task=sentiment, or a file or folder of records")
    from minillm.data.tasks import load_task

    return load_task(config.task, seed=config.task_seed, folder=config.folder or None)
