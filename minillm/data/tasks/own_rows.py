"""Rows of a file to the records of a task, with everything that is wrong said at once."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minillm.config import nearest
from minillm.data.tasks.task import Choice, Kind, Question, Record, Rewrite, Tagged, Text

MOST = 5  # rows that one line of an error names


class Columns(NamedTuple):
    """What a row of this kind of task must have and may have, and the metrics of the kind."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: tuple[str, ...]


COLUMNS: Mapping[Kind, Columns] = {  # in the order in which a kind is recognised
    "question_answering": Columns(("question", "context", "answer"), ("start",), ("token_f1", "exact_match")),
    "tagging": Columns(("words", "tags"), (), ("accuracy", "macro_f1")),
    "rewriting": Columns(("source", "target"), (), ("chrf", "exact_match")),
    "choice": Columns(("text", "choices", "label"), (), ("accuracy",)),
    "classification": Columns(("text", "label"), ("second", "group"), ("accuracy", "macro_f1")),
    "regression": Columns(("text", "label"), ("second", "group"), ("pearson", "spearman")),
}
Row = tuple[str, dict[str, Any]]  # where it stands, and its cells by our names


@dataclass
class Rows:
    """The rows of one split, and what is wrong with them."""

    name: str
    rows: list[Row]
    wrong: dict[str, list[str]] = field(default_factory=dict)  # flaw: where

    def blame(self, place: str, flaw: str) -> None:
        self.wrong.setdefault(flaw, []).append(place)

    def flaws(self) -> list[str]:
        """One line for each flaw, with the first places of it."""
        return [
            f"{self.name}: {flaw} ({len(places)} rows: {', '.join(places[:MOST])}{', ...' * (len(places) > MOST)})"
            for flaw, places in self.wrong.items()
        ]


def rename(rows: Sequence[tuple[int, dict]], names: Mapping[str, str | int]) -> list[Row]:
    """Rows with our names for their columns; `names` gives the file's for those that are called otherwise."""
    taken = set(names.values())
    return [
        (str(number), {ours: row[theirs] for ours, theirs in names.items() if theirs in row}
         | {key: value for key, value in row.items() if key not in taken and key not in names})
        for number, row in rows
    ]  # fmt: skip


def find_kind(rows: Sequence[Row]) -> Kind:
    """By the columns that the rows have; labels that are all numbers, one of them with a point, are scores."""
    have = {key for _, row in rows for key in row}
    for kind, columns in COLUMNS.items():
        if have.issuperset(columns.needed):
            scores = [score(row["label"]) for _, row in rows if "label" in row] if kind == "classification" else []
            fractions = any(isinstance(row.get("label"), float) or "." in str(row.get("label")) for _, row in rows)
            return "regression" if scores and None not in scores and fractions else kind
    wanted = [" + ".join(columns.needed) for columns in COLUMNS.values()]
    raise ValueError(
        f"the columns {', '.join(sorted(map(str, have))) or '(none)'} fit no kind of task: it needs "
        f'{", or ".join(dict.fromkeys(wanted))}. Name yours, as in label="stars"'
    )


def missing_columns(kind: Kind, split: str, rows: Sequence[Row]) -> list[str]:
    have = sorted({str(key) for _, row in rows for key in row})
    lost = [name for name in COLUMNS[kind].needed if not any(name in row for _, row in rows)]
    return [
        f"{split}: {kind} needs a column {name!r}, there are {', '.join(have) or 'none'}; did you mean "
        f'{nearest(name, have)}? Name it as in {name}="..."'
        for name in lost
    ]


def to_records(kind: Kind, rows: Rows, labels: Sequence[str]) -> list[Record]:
    """The records of the rows that are right; what is wrong with the others stands in `rows.wrong`."""
    records = []
    for place, row in rows.rows:
        if empty := [n for n in COLUMNS[kind].needed if row.get(n) is None or not str(row[n]).strip()]:
            rows.blame(place, f"nothing in the column {empty[0]!r}")
            continue
        try:
            records.append(MAKERS[kind](row, labels))
        except ValueError as error:
            rows.blame(place, str(error))
    return records


def _text(row: dict[str, Any], labels: Sequence[str]) -> Text:
    return Text(_string(row, "text"), _number(row["label"], labels), *_beside(row))


def _scored(row: dict[str, Any], labels: Sequence[str]) -> Text:
    value = score(row["label"])
    if value is None or not math.isfinite(value):
        raise ValueError("the label is no finite number")
    return Text(_string(row, "text"), value, *_beside(row))


def _beside(row: dict[str, Any]) -> tuple[str | None, str]:
    second = _string(row, "second") if row.get("second") is not None else None
    return second, str(row.get("group") or "")


def _tagged(row: dict[str, Any], labels: Sequence[str]) -> Tagged:
    words, tags = items(row["words"]), items(row["tags"])
    if len(words) != len(tags):
        raise ValueError("another number of tags than of words")
    return Tagged(tuple(words), tuple(_number(tag, labels) for tag in tags))


def _choice(row: dict[str, Any], labels: Sequence[str]) -> Choice:
    choices, label = row["choices"], row["label"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise ValueError("choices is no list of two texts or more")
    number = choices.index(label) if label in choices else label
    if type(number) is not int or not 0 <= number < len(choices):
        raise ValueError("the label is none of the choices, nor the number of one (from 0)")
    return Choice(_string(row, "text"), tuple(choices), number)


def _question(row: dict[str, Any], labels: Sequence[str]) -> Question:
    context, answers = _string(row, "context"), items(row["answer"], whole=True)
    if said := row.get("start") not in (None, ""):
        starts = [int(start) if start.strip().isdecimal() else -1 for start in items(row["start"], whole=True)]
    else:
        starts = [context.find(answer) for answer in answers]
    places = list(zip(starts, answers, strict=False))
    if len(starts) != len(answers) or any(s < 0 or context[s : s + len(a)] != a for s, a in places):
        raise ValueError("the answer does not stand in the context" + " at start" * said)
    return Question(_string(row, "question"), context, tuple(answers), tuple(starts))


def _rewrite(row: dict[str, Any], labels: Sequence[str]) -> Rewrite:
    return Rewrite(_string(row, "source"), tuple(items(row["target"], whole=True)))


MAKERS: Mapping[Kind, Callable[[dict[str, Any], Sequence[str]], Record]] = {
    "classification": _text,
    "regression": _scored,
    "tagging": _tagged,
    "choice": _choice,
    "question_answering": _question,
    "rewriting": _rewrite,
}


def label_names(kind: Kind, rows: Sequence[Row]) -> list[str]:
    """The classes or tags of these rows, in the order of the alphabet, of numbers in theirs."""
    if kind == "tagging":
        found = {tag for _, row in rows if row.get("tags") is not None for tag in items(row["tags"])}
    else:
        found = {_name(row["label"]) for _, row in rows if row.get("label") is not None}
    found.discard("")
    return sorted(found, key=int) if all(re.fullmatch(r"-?\d+", name) for name in found) else sorted(found)


def score(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def items(value: Any, whole: bool = False) -> list[str]:
    """The items of a JSON list, or of a text: its words, or itself when `whole`."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)] if whole else str(value).split()


def _name(label: Any) -> str:
    return str(label).strip()


def _number(label: Any, labels: Sequence[str]) -> int:
    if (name := _name(label)) not in labels:
        raise ValueError(f"the label {name!r} stands in no row of train, which has {', '.join(labels[:20])}")
    return labels.index(name)


def _string(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} is a {type(row[column]).__name__}, not a text")
    return row[column]
