"""Reading the files of a published set: everything that is wrong with them is said in one error."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minillm.data.reading import MOST_NAMED, decode
from minillm.data.tasks.published.source import Source

T = TypeVar("T")


class Flaw(ValueError):
    """What is wrong with one record."""


class Row(NamedTuple):
    file: str
    number: int  # of its line, from 1
    value: Any


class Files:
    """The files of one set, as a context: its end raises one ValueError with everything that was wrong in them.

    Example: `with Files(SOURCE, folder, ["a.tsv"]) as files: made = files.records(files.table("a.tsv", columns), make)`
    """

    def __init__(self, source: Source, folder: str | Path | None, names: Sequence[str]):
        self.source, self.names = source, tuple(names)
        self.folder = source.find(folder, names)
        self.flaws: list[str] = []

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None or not self.flaws:
            return
        named = self.flaws[:MOST_NAMED]
        more = [f"and {len(self.flaws) - MOST_NAMED} more"] if len(self.flaws) > MOST_NAMED else []
        raise ValueError(
            f"the set {self.source.name} in {self.folder} cannot be used:\n  " + "\n  ".join([*named, *more])
            + f"\nIts files come from {self.source.address} at {self.source.commit}."
        )  # fmt: skip

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def text(self, name: str) -> str:
        """The text of a file; "" when there is none to be had, which is noted."""
        if not self.has(name):
            beside = sorted(path.name for path in (self.folder / name).parent.glob("*"))[:8]
            self.flaws.append(f"{name} is missing; its folder holds {', '.join(beside) or 'nothing'}")
            return ""
        try:
            content = decode(self.folder / name)
        except ValueError as error:
            self.flaws.append(str(error))
            return ""
        if not content.strip():
            self.flaws.append(f"{name} is empty")
        return content

    def lines(self, name: str) -> list[Row]:
        """The lines as they stand; an empty one is a flaw."""
        # not splitlines(): U+2028, U+0085 and their like stand inside texts
        lines = self.text(name).removesuffix("\n").split("\n")
        rows = [Row(name, number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
        self.flaws += [f"{name}:{row.number}: an empty line" for row in rows if not row.value.strip() and len(rows) > 1]
        return [row for row in rows if row.value.strip()]

    def table(self, name: str, columns: Sequence[str], *, header: bool = False, quoted: bool = False) -> list[Row]:
        """Rows as dicts of `columns`: tab-separated, quotes meaning nothing; or `quoted`, as spreadsheets write commas.

        header: the first row names the columns; it must have all of `columns` and may have more.
        """
        rows = self._quoted(name) if quoted else [row._replace(value=row.value.split("\t")) for row in self.lines(name)]
        names = list(columns)
        if header and rows:
            names = rows[0].value
            if missing := [column for column in columns if column not in names]:
                self.flaws.append(f"{name}:1: no column {', '.join(missing)}; it has {', '.join(names)}")
                return []
            rows = rows[1:]
        wrong = [row for row in rows if len(row.value) != len(names)]
        self.flaws += [
            f"{row.file}:{row.number}: {len(row.value)} cells, not {len(names)} ({', '.join(names)})" for row in wrong
        ]
        return [
            row._replace(value=dict(zip(names, row.value, strict=True))) for row in rows if len(row.value) == len(names)
        ]

    def _quoted(self, name: str) -> list[Row]:
        reader = csv.reader(io.StringIO(self.text(name), newline=""), strict=True)
        rows: list[Row] = []
        try:
            rows += (Row(name, reader.line_num, cells) for cells in reader if cells)
        except csv.Error as error:
            self.flaws.append(f"{name}:{reader.line_num}: {error}")
        return rows

    def objects(self, name: str) -> list[Row]:
        """One JSON object a line."""
        rows = []
        for row in self.lines(name):
            try:
                value = json.loads(row.value)
            except json.JSONDecodeError as error:
                self.flaws.append(f"{name}:{row.number}: not JSON, column {error.colno}: {error.msg}")
                continue
            except RecursionError:
                self.flaws.append(f"{name}:{row.number}: nested too deeply")
                continue
            if isinstance(value, dict):
                rows.append(row._replace(value=value))
            else:
                self.flaws.append(f"{name}:{row.number}: a JSON {type(value).__name__} instead of an object")
        return rows

    def records(self, rows: Iterable[Row], make: Callable[[Any], T]) -> list[T]:
        """`make` of every row's value; the Flaws it raises are noted with their lines."""
        made = []
        for row in rows:
            try:
                made.append(make(row.value))
            except Flaw as flaw:
                self.flaws.append(f"{row.file}:{row.number}: {flaw}")
        return made


def member(row: dict, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a JSON object or a table's row: there, of its kind, and not an empty text; Flaw otherwise."""
    if name not in row:
        raise Flaw(f"no field {name!r}; it has {', '.join(map(repr, row))}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise Flaw(f"{name!r} is {value!r}, expected a {expected}{' that is not empty' if expected == 'str' else ''}")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):  # JSON can write it, UTF-8 cannot
        raise Flaw(f"{name!r} holds half of a surrogate pair")
    return value


def number_of(label: str, labels: Sequence[str]) -> int:
    """The number of a label's name; Flaw when it is none of `labels`."""
    if label not in labels:
        raise Flaw(f"the label {label!r} is none of {', '.join(labels)}")
    return labels.index(label)
