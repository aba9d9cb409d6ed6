"""`minillm tasks`: what there is to be tuned for, with examples, and the same as files."""

import inspect
import json
from pathlib import Path

from minillm.config import nearest
from minillm.data import Document
from minillm.data.tasks import SPLITS, TASKS, Record, Tagged, Task, load_task
from minillm.data.tasks.generated.domains import DOMAINS, domain_corpus
from minillm.data.tasks.save import save_task, to_row
from minillm.files import atomic_folder
from minillm.recipes.common import format_table

WIDTH = 100  # characters of an example in the list


def tasks(
    name: str | None = None,
    *,
    split: str = "train",
    count: int = 10,
    seed: int = 0,
    folder: str | None = None,
    save: str | None = None,
) -> str:
    """A table of all tasks (None), or the card of one and `count` of its records; `save` writes them to a folder."""
    if count < 1:
        raise ValueError(f"count={count}: how many records to show, a whole number from 1")
    if name is None:
        if folder or save:
            raise ValueError(f"{'folder' if folder else 'save'}: of which task? minillm tasks NAME")
        return list_tasks()
    if name in DOMAINS:
        if folder:
            raise ValueError(f"folder: {name} is made without files")
        return show_corpus(name, split, count, seed, save)
    if name not in TASKS and not Path(name).exists() and Path(name).name == name and not Path(name).suffix:
        near = nearest(name, [*TASKS, *DOMAINS])
        raise ValueError(f"there is no task or domain {name!r}; did you mean {near}? Nor is there a file of that name")
    task = load_task(name, seed=seed, folder=folder)
    if save:
        save_task(task, save)
    shown = [show(task, record) for record in task[split][:count]]
    return "\n\n".join([card(task), *shown, *([f"written to {save}"] if save else [])])


def list_tasks() -> str:
    """All tasks: those that are made here with a card each, those that need files of a published set with a line."""
    made = {name: load_task(name) for name in TASKS if not needs_files(name)}
    header = ("task", "kind", "train/valid/test", "score", "ceiling", "counting words")
    rows = [
        (name, task.kind, sizes(task), task.score, number(task.ceiling), number(task.counting))
        for name, task in made.items()
    ]
    examples = [f"{name}: {_doc(name)}\n  {shorten(show(task, task['train'][0]))}" for name, task in made.items()]
    published = [f"{name}: {_doc(name)}" for name in TASKS if needs_files(name)]
    parts = [format_table(header, rows), "\n".join(examples)]
    if published:
        parts.append("published sets, read from a folder of yours (folder=...):\n" + "\n".join(published))
    parts.append(f"texts of other domains, to adapt a base to: {', '.join(DOMAINS)}")
    return "\n\n".join(parts)


def needs_files(name: str) -> bool:
    return "folder" in inspect.signature(TASKS[name]).parameters


def card(task: Task) -> str:
    """What is known about a task, in a few lines."""
    facts = {
        "kind": task.kind,
        "records": f"{sizes(task)} ({'/'.join(SPLITS)})",
        "labels": ", ".join(task.labels),
        "scores": ", ".join(task.metrics),
        "ceiling": f"{number(task.ceiling)}; by counting words: {number(task.counting)}",
        "what": task.description,
        "source": task.source + (f" ({task.licence})" if task.licence else ""),
    }
    return "\n".join([task.name, *(f"  {key.ljust(8)} {value}" for key, value in facts.items() if value)])


def number(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def sizes(task: Task) -> str:
    return "/".join(str(len(task[split])) for split in SPLITS)


def show(task: Task, record: Record) -> str:
    """A record as people read it."""
    if isinstance(record, Tagged):
        return " ".join(f"{word}/{task.labels[tag]}" for word, tag in zip(record.words, record.tags, strict=True))
    row = to_row(task, record)
    return "\n".join(f"{key}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in row.items())


def shorten(text: str) -> str:
    line = " | ".join(text.splitlines())
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def show_corpus(name: str, split: str, count: int, seed: int, save: str | None) -> str:
    training, held_out = domain_corpus(name, seed=seed)
    if save:
        save_corpus(save, training, held_out)
    head = f"{name}: {len(training)} documents to learn from, {len(held_out)} held out"
    texts = [document.text for document in (training if split == "train" else held_out)[:count]]
    return "\n\n".join([head, *texts, *([f"written to {save}"] if save else [])])


def save_corpus(folder: str | Path, training: list[Document], held_out: list[Document]) -> None:
    """train.jsonl and held_out.jsonl, as data.train and data.held_out of `minillm pretrain` and `tune` read them."""
    with atomic_folder(folder) as new:
        for name, documents in (("train", training), ("held_out", held_out)):
            lines = (json.dumps({"text": document.text}, ensure_ascii=False) + "\n" for document in documents)
            (new / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _doc(name: str) -> str:
    return (TASKS[name].__doc__ or "").strip().partition("\n")[0]
