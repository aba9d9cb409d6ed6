"""Where a published set comes from, and where its files lie."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.tasks.task import Kind, Record, Task, content

FOLDER = "MINILLM_DATA"  # the environment variable that names the folder of all sets


@dataclass(frozen=True)
class Source:
    """A published set: its folder's name beside the other sets, and who made it."""

    name: str
    address: str  # the repository and the folder in it
    commit: str
    paper: str
    licence: str

    def __str__(self) -> str:
        return f"{self.paper}; {self.address} at {self.commit}"

    def find(self, folder: str | Path | None, files: Sequence[str]) -> Path:
        """The folder that holds any of `files`: `folder` itself, or the one of this set's name in it."""
        given = folder or os.environ.get(FOLDER)
        help = (
            f"Get {', '.join(files)} from {self.address} at {self.commit}, put them into a folder {self.name}, and "
            f"name it, or the one it lies in: folder=..., or the environment variable {FOLDER}. "
            f"minillm.data.tasks.published.download({self.name!r}, folder) fetches what it can."
        )
        if not given:
            raise ValueError(f"no folder is named for the set {self.name}. {help}")
        places = [Path(given) / self.name, Path(given)]
        for place in places:
            if any((place / file).is_file() for file in files):
                return place
        raise ValueError(f"none of the files of the set {self.name} is in {places[0]} or {places[1]}. {help}")

    def task(
        self,
        name: str,
        kind: Kind,
        splits: Mapping[str, Sequence[Record]],
        metrics: tuple[str, ...],
        labels: tuple[str, ...] = (),
        *,
        description: str,
        overlap: int | None = 0,
    ) -> Task:
        """The set as a task; of `description` the first line is kept.

        overlap: as in Task, measured on the files at `commit`. None where nobody has measured it: then train loses
        what also stands in valid or test.
        """
        if overlap is None:
            judged = {content(record) for split in ("valid", "test") for record in splits[split]}
            splits = {**splits, "train": [record for record in splits["train"] if content(record) not in judged]}
        return Task(
            name=name,
            kind=kind,
            splits={split: tuple(records) for split, records in splits.items()},
            metrics=metrics,
            labels=labels,
            description=description.strip().split("\n")[0],
            source=str(self),
            licence=self.licence,
            overlap=overlap or 0,
        )


def one_of(option: str, value: Any, allowed: Sequence[Any]) -> Any:
    """`value` if it is allowed, else one error that lists what is."""
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{option}={value!r}: one of {', '.join(map(repr, allowed))}")
    return value


def variant(name: str, *, default: object, chosen: object) -> str:
    """The task's name: that of the set, and the option if it is not the usual one."""
    return name if chosen == default else f"{name}-{chosen}"
