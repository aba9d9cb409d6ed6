"""A task of your own: a file of records, or a folder with train, valid and test.

load_task("reviews.csv", text="review", label="stars")
load_task("my_folder")                                     # train.jsonl, valid.jsonl, test.jsonl, or train.csv, ...
"""

import random
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from minillm.config import nearest
from minillm.data.reading import PARSERS, read_records
from minillm.data.tasks.generated.draw import plain
from minillm.data.tasks.own_rows import COLUMNS, Row, Rows, find_kind, label_names, missing_columns, rename, to_records
from minillm.data.tasks.task import SPLITS, Kind, Record, Task, Text

CALLED = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
SHARE = 0.1  # of the records, cut for each of valid and test where they are not given
NAMES = tuple(dict.fromkeys(name for c in COLUMNS.values() for name in (*c.needed, *c.optional)))


def load_own(
    path: str | Path,
    seed: int = 0,
    *,
    kind: Kind | None = None,
    metrics: Sequence[str] = (),
    overlap: int = 0,
    text: str | int = "text", second: str | int = "second", label: str | int = "label", group: str | int = "group",
    choices: str | int = "choices", words: str | int = "words", tags: str | int = "tags",
    question: str | int = "question", context: str | int = "context", answer: str | int = "answer",
    start: str | int = "start", source: str | int = "source", target: str | int = "target",
) -> Task:  # fmt: skip
    """The task in a .jsonl, .json, .csv or .tsv file, or in a folder with such files called train, valid and test.

    text, second, ..: what the columns are called there, or their numbers from 0 in tables without a header.
    kind: by the columns if not given (see `COLUMNS`); labels that are numbers with points are scores.
    A list of words, tags, answers or targets is a JSON list; of words and tags also a text with spaces.
    What is not given of valid and test is cut from train: a tenth each, by seed, of each class alike; records of one
    `group` stay together, copies are left out with a warning.
    ValueError lists everything that is wrong, `overlap` is how many records of valid and test may stand in train.
    """
    given = dict(zip(NAMES, (question, context, answer, start, words, tags, source, target, text, choices, label,
        second, group), strict=True))  # fmt: skip
    path = Path(path)
    files = find_files(path)
    numbered = any(isinstance(name, int) for name in given.values())
    read = {split: rename(read_records(file, numbered), given) for split, file in files.items()}
    if empty := [split for split, rows in read.items() if not rows]:
        raise ValueError(f"the task in {path} cannot be used: no records in {', '.join(str(files[s]) for s in empty)}")
    kind = _kind(path, kind, read["train"])
    wrong = [line for split, rows in read.items() for line in missing_columns(kind, split, rows)]
    if wrong:
        raise _refused(path, wrong)
    labels = label_names(kind, read["train"]) if kind in ("classification", "tagging") else []
    sides = {split: Rows(split, rows) for split, rows in read.items()}
    records = {split: to_records(kind, rows, labels) for split, rows in sides.items()}
    wrong = [line for rows in sides.values() for line in rows.flaws()]
    if len(labels) == 1 or (kind == "regression" and len({r.label for r in records["train"]}) == 1):
        wrong.append(f"train: every row has the same label, {labels[0] if labels else records['train'][0].label!r}")
    if len(labels) > max(50, len(records["train"]) // 2):
        wrong.append(
            f'train: {len(labels)} different labels for {len(records["train"])} rows; scores? Say kind="regression"'
        )
    wrong += given_away(records["train"], labels) + contradictions(records)
    if wrong:
        raise _refused(path, wrong)
    splits = cut(path, records, seed)
    return Task(
        path.name, kind, {split: tuple(rows) for split, rows in splits.items()},
        metrics=tuple(metrics) or COLUMNS[kind].metrics, labels=tuple(labels), source=str(path), overlap=overlap,
    )  # fmt: skip


def find_files(path: Path) -> dict[str, Path]:
    """{split: its file}; a single file is all of train."""
    if not path.exists():
        raise ValueError(f"{path} does not exist (working folder: {Path.cwd()})")
    if path.is_file():
        return {"train": path}
    here = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    found = {
        split: [f for f in here if f.name.split(".")[0] in names and _records_in(f)] for split, names in CALLED.items()
    }
    several = [", ".join(file.name for file in files) for files in found.values() if len(files) > 1]
    if not found["train"] or several:
        raise ValueError(
            f"{path}: " + (f"several files for one split: {'; '.join(several)}" if several else "no file for train")
            + f"; a folder has train{'|'.join(PARSERS)}, and perhaps valid and test; there are "
            f"{', '.join(f.name for f in here) or 'no files'}"
        )  # fmt: skip
    return {split: files[0] for split, files in found.items() if files}


def _records_in(file: Path) -> bool:
    return Path(file.name.lower().removesuffix(".gz")).suffix in PARSERS


def _kind(path: Path, kind: Kind | None, rows: Sequence[Row]) -> Kind:
    if kind is None:
        try:
            return find_kind(rows)
        except ValueError as error:
            raise _refused(path, [str(error)]) from None
    if kind not in COLUMNS:
        raise _refused(path, [f"kind={kind!r}: did you mean {nearest(str(kind), COLUMNS)}?"])
    return kind


def _refused(path: Path, wrong: Sequence[str]) -> ValueError:
    return ValueError(f"the task in {path} cannot be used:\n  " + "\n  ".join(wrong))


def given_away(train: Sequence[Record], labels: Sequence[str]) -> list[str]:
    """Whether nearly every text names its own label: then the task is to copy it."""
    texts = [record for record in train if isinstance(record, Text) and isinstance(record.label, int)]
    named = 0
    for record in texts:
        words = set(re.findall(r"\w+", f"{record.text} {record.second or ''}".lower()))
        named += [label for label in labels if set(re.findall(r"\w+", label.lower())) <= words] == [
            labels[record.label]
        ]
    if len(texts) < 10 or named < 0.95 * len(texts):
        return []
    return [f"train: the label's name stands in the text of {named} of {len(texts)} rows: take it out of them"]


def contradictions(records: dict[str, list[Record]]) -> list[str]:
    """Records of valid and test that train has with another answer."""
    answers: dict[str, set[str]] = {}
    for record in records["train"]:
        answers.setdefault(plain(record), set()).add(_answer(record))
    lines = []
    for split in SPLITS[1:]:
        other = [r for r in records.get(split, ()) if plain(r) in answers and _answer(r) not in answers[plain(r)]]
        if other:
            lines.append(f"{split}: {len(other)} records stand in train with another answer, such as {other[0]}")
    return lines


def _answer(record: Record) -> str:
    return str([getattr(record, name, None) for name in ("label", "tags", "answers", "targets")])


def cut(path: Path, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
    """The splits; what is missing is cut from train, each class alike, records of a group together."""
    if not (missing := [split for split in SPLITS[1:] if split not in records]):
        return records
    units: dict[str, list[Record]] = {}
    for record in records["train"]:
        units.setdefault(getattr(record, "group", "") or plain(record), []).append(record)
    different = {name: list({plain(record): record for record in unit}.values()) for name, unit in units.items()}
    if copies := sum(map(len, units.values())) - sum(map(len, different.values())):
        warnings.warn(f"{path}: left out {copies} records that are copies of others", stacklevel=3)
    classes: dict[str, list[list[Record]]] = {}
    for unit in different.values():
        classes.setdefault(str(unit[0].label) if isinstance(unit[0], Text) else "", []).append(unit)
    if any(isinstance(u[0], Text) and isinstance(u[0].label, float) for us in classes.values() for u in us):
        classes = {"": [unit for units in classes.values() for unit in units]}
    splits = {**records, "train": [], **{split: [] for split in missing}}
    chance = random.Random(f"cut {seed}")
    for own in classes.values():
        chance.shuffle(own)
        size = max(1, round(SHARE * len(own))) if len(own) > len(missing) else 0
        for number, unit in enumerate(own):
            splits[missing[number // size] if size and number < size * len(missing) else "train"] += unit
    return splits
