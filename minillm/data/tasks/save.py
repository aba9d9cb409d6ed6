"""A task as files that people and `load_task` can read: a record a line."""

import json
from pathlib import Path
from typing import Any

from minillm.data.tasks.task import Choice, Question, Record, Rewrite, Tagged, Task
from minillm.files import atomic_folder


def save_task(task: Task, folder: str | Path) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl, with the names of labels and tags; `load_task(folder)` reads them.

    An older folder is replaced if no other file lies in it, else ValueError.
    """
    with atomic_folder(folder) as new:
        for split, records in task.splits.items():
            lines = (json.dumps(to_row(task, record), ensure_ascii=False) + "\n" for record in records)
            (new / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def to_row(task: Task, record: Record) -> dict[str, Any]:
    """A record by the column names of `load_own`."""
    if isinstance(record, Tagged):
        return {"words": list(record.words), "tags": [task.labels[tag] for tag in record.tags]}
    if isinstance(record, Rewrite):
        return {"source": record.source, "target": list(record.targets)}
    if isinstance(record, Question):
        answers = {"answer": list(record.answers), "start": list(record.starts)}
        return {"question": record.question, "context": record.context, **answers}
    if isinstance(record, Choice):
        return {"text": record.text, "choices": list(record.choices), "label": record.label}
    label = task.labels[record.label] if task.kind == "classification" else record.label
    beside = {"second": record.second, "group": record.group}
    return {"text": record.text, **{name: value for name, value in beside.items() if value}, "label": label}
