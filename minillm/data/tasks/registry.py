"""Every task by name. A new task is a file with a function that makes it, and a line here."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minillm.config import nearest, seed_flaw
from minillm.data.tasks.own import load_own
from minillm.data.tasks.published import PUBLISHED
from minillm.data.tasks.task import Task


class Tasks(Mapping[str, Callable[..., Task]]):
    """The function that makes each task, by the task's name; its file is imported when it is asked for.

    A function may take `seed`, options of its own and, where it reads a published set, `folder`.
    """

    def __init__(self, places: Mapping[str, str]):
        self._places, self._registered = places, dict[str, Callable[..., Task]]()

    def __getitem__(self, name: str) -> Callable[..., Task]:
        if name in self._registered:
            return self._registered[name]
        if name not in self._places:
            raise KeyError(f"there is no task {name!r}; did you mean {nearest(str(name), self)}?")
        module, _, function = self._places[name].rpartition(".")
        return getattr(importlib.import_module(module), function)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._registered  # without importing it

    def __iter__(self) -> Iterator[str]:
        return iter((*self._places, *self._registered))

    def __len__(self) -> int:
        return len(self._places) + len(self._registered)

    def register(self, name: str, make: Callable[..., Task]) -> None:
        wrong = []
        if name in self:
            wrong.append("there is such a task; choose another name")
        if not name.replace("-", "_").isidentifier():
            wrong.append('a name has letters, digits and "-" only, so that it is no path')
        if not callable(make):
            wrong.append(f"a function that makes the task is needed, not {make!r}")
        if wrong:
            raise ValueError(f"register_task({name!r}): " + "; ".join(wrong))
        self._registered[name] = make


HERE = "minillm.data.tasks"
TASKS = Tasks(
    {
        "sentiment": f"{HERE}.generated.sentiment.sentiment",
        "topic": f"{HERE}.generated.topic.topic",
        "nli": f"{HERE}.generated.nli.nli",
        "spam": f"{HERE}.generated.spam.spam",
        "similarity": f"{HERE}.generated.similarity.similarity",
        "pos": f"{HERE}.generated.pos.pos",
        "entities": f"{HERE}.generated.entities.entities",
        "qa": f"{HERE}.generated.qa.qa",
        "translation": f"{HERE}.generated.translation.translation",
        "summarisation": f"{HERE}.generated.summarisation.summarisation",
        "instructions": f"{HERE}.generated.instructions.instructions",
        **PUBLISHED,
    }
)


def register_task(name: str, make: Callable[..., Task]) -> None:
    """Let `load_task(name, seed=..)` call `make(seed=..)`, for this process: a file is never run by being named."""
    TASKS.register(name, make)


def load_task(name: str | Path, seed: int = 0, folder: str | Path | None = None, **options: Any) -> Task:
    """The task of this name, or the one in a file or folder of your own (see `load_own`).

    `folder`: where the files of a published set lie. `options` are those of the task, such as train=200, or the names
    of your columns. A name that is a task's and a file's means the task; "./name" is the file.
    """
    if name in TASKS:
        return _make(str(name), TASKS[str(name)], seed, folder, options)
    path = Path(name)
    if not (path.exists() or path.suffix or path.name != str(name)):
        raise ValueError(
            f"there is no task {str(name)!r}; did you mean {nearest(str(name), TASKS)}? Nor is there a file or folder "
            f"of that name in {Path.cwd()}"
        )
    if path.suffix == ".py":
        raise ValueError(f"{path}: loading runs no code; import your file and call register_task(name, function)")
    extra = {} if folder is None else {"folder": folder}
    _check_options(f"the task in {path}", load_own, options | extra)
    return load_own(path, seed=seed, **options)


def _make(
    name: str, make: Callable[..., Task], seed: int, folder: str | Path | None, options: Mapping[str, Any]
) -> Task:
    given = dict(options) if folder is None else {**options, "folder": folder}
    _check_options(f"the task {name!r}", make, given)
    if "seed" in inspect.signature(make).parameters:  # a published set with splits of its own needs none
        given["seed"] = seed
    if wrong := seed_flaw(seed):
        raise ValueError(f"{name}: {wrong[0]}")
    task = make(**given)
    if not isinstance(task, Task):
        raise ValueError(f"the function of {name!r} gave a {type(task).__name__}, not a Task")
    return task


def _check_options(what: str, make: Callable[..., Task], given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(make).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    known = [option for option in parameters if option not in ("seed", "path")]
    wrong = [
        f"folder={given['folder']!r}: it is made without files"
        if option == "folder"
        else f"{option}={given[option]!r}: there is no such option; did you mean {nearest(option, known)}?"
        for option in given
        if option not in known
    ]
    for option in (o for o in known if parameters[o].default is inspect.Parameter.empty and o not in given):
        wrong.append(f"{option} is missing" + (": where the files of the set lie" if option == "folder" else ""))
    if wrong:
        raise ValueError(f"{what}: " + "; ".join(wrong))
