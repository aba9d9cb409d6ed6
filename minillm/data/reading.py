"""Files to documents: plain text, folders, JSON, tables; `.gz` of each."""

import codecs
import csv
import gzip
import io
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minillm.data.documents import Document

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".rst", ".py")
TABLE_EXTENSIONS = (".jsonl", ".tsv", ".csv")
MOST_NAMED = 20  # broken lines or files that one error spells out


class Fields(NamedTuple):
    """Which field of a record is what: names (JSON keys, names in a table's header) or column numbers from 0."""

    text: str | int
    prompt: str | int
    completion: str | int
    numbers: bool = False


class Parsed(NamedTuple):
    """The records of a file, each with its number, and what is wrong with those that are none."""

    records: list[tuple[int, dict]]
    broken: list[str]
    unit: str = "line"


def read_documents(
    path: str | Path,
    *,
    text: str | int = "text",
    prompt: str | int = "prompt",
    completion: str | int = "completion",
    numbers: bool = False,
    extensions: Sequence[str] = TEXT_EXTENSIONS,
) -> list[Document]:
    """All documents under `path`, in a fixed order; ValueError names every line or file that cannot be read.

    .jsonl  one JSON object a line, {"text": ..} or {"prompt": .., "completion": ..}; other fields are ignored
    .json   a list of such objects, or of texts; only if it is named itself: in folders it is as often a config
    .tsv    one row a line, cells between tabs as they stand (quotes mean nothing)
    .csv    as spreadsheets write it; in both tables the first row names the columns, unless columns are numbers
    folder  every file below it with one of `extensions` or of the above (hidden ones not), sorted by path
    other   any other file is one document of UTF-8 text, whatever its extension
    Any of them may be compressed (.gz). `text`, `prompt`, `completion` rename the fields; with `numbers` a completion
    may also be a whole number, as classes often are. What a folder holds besides, and documents of nothing but white
    space, are left out with one warning that counts them.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist (working folder: {Path.cwd()})")
    fields = Fields(text, prompt, completion, numbers)
    files, skipped = _files_below(path, (*extensions, *TABLE_EXTENSIONS)) if path.is_dir() else ([path], [])
    documents = _read_files(files, fields)
    kept = [document for document in documents if document.full_text.strip()]
    if not kept:
        raise ValueError(
            f"{path} holds no text: {len(files)} files with {len(documents)} documents were read, {len(skipped)} "
            f"skipped. In folders these count: {', '.join((*extensions, *TABLE_EXTENSIONS))} (and .gz of them)."
        )
    _report(path, skipped, [document.name for document in documents if not document.full_text.strip()])
    return kept


def read_records(file: str | Path, numbered: bool = False) -> list[tuple[int, dict]]:
    """(line or record number, fields) of every record of a .jsonl, .json, .tsv or .csv file (or .gz of one).

    The columns of a table without a header are `numbered` from 0. ValueError names every record that cannot be read.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is no file (working folder: {Path.cwd()})")
    if (extension := _extension(file)) not in PARSERS:
        raise ValueError(f"{file} holds no records: its name must end with {', '.join(PARSERS)} (or .gz after it)")
    found = PARSERS[extension](file, decode(file), Fields(0 if numbered else "text", "", ""))
    if found.broken:
        more = [f"and {len(found.broken) - MOST_NAMED} more"] if len(found.broken) > MOST_NAMED else []
        raise ValueError(f"{file} cannot be read:\n  " + "\n  ".join(found.broken[:MOST_NAMED] + more))
    return found.records


def _files_below(folder: Path, extensions: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(files to read, files skipped), sorted by path; hidden files and folders are in neither."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name) for name in names if not name.startswith(".")]
    found.sort(key=lambda file: file.relative_to(folder).parts)
    return [f for f in found if _extension(f) in extensions], [f for f in found if _extension(f) not in extensions]


def _extension(file: Path) -> str:
    """The extension in small letters, without a final .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _report(path: Path, skipped: list[Path], empty: list[str]) -> None:
    parts = []
    if skipped:
        kinds = Counter(_extension(file) or file.name for file in skipped)
        parts.append(f"{len(skipped)} files of other kinds ({', '.join(f'{k}: {n}' for k, n in kinds.most_common(8))})")
    if empty:
        parts.append(f"{len(empty)} documents without text (e.g. {', '.join(empty[:3])})")
    if parts:
        warnings.warn(f"{path}: left out " + " and ".join(parts), stacklevel=3)


def _read_files(files: list[Path], fields: Fields) -> list[Document]:
    documents: list[Document] = []
    broken: list[str] = []
    for file in files:
        try:
            content = decode(file)
            if parse := PARSERS.get(_extension(file)):
                documents += _documents(file, parse(file, content, fields), fields)
            else:
                documents.append(Document(str(file), content))
        except ValueError as error:
            broken.append(str(error))
    if broken:
        more = [f"and {len(broken) - MOST_NAMED} files more"] if len(broken) > MOST_NAMED else []
        raise ValueError("\n".join(broken[:MOST_NAMED] + more))
    return documents


def decode(file: Path) -> str:
    """The file's text. Only UTF-8: guessing an encoding gives wrong letters without a word."""
    try:
        data = file.read_bytes()
        if file.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        decoded = data[start:].decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte {start + error.start} is 0x{data[start + error.start]:02X} "
            f"({error.reason}). Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    if "\0" in decoded:
        raise ValueError(f"{file} is not text: byte {data.index(0)} is 0x00 (a binary file, or UTF-16?)")
    return decoded


def _parse_json_lines(file: Path, content: str, fields: Fields) -> Parsed:
    records: list[tuple[int, dict]] = []
    broken: list[str] = []
    # not splitlines(): inside a JSON string U+2028 and its like are ordinary characters
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            broken.append(f"line {number}: not JSON, column {error.colno}: {error.msg}")
            continue
        if isinstance(record, dict):
            records.append((number, record))
        else:
            broken.append(f"line {number}: a JSON {type(record).__name__} instead of an object")
    return Parsed(records, broken)


def _parse_json(file: Path, content: str, fields: Fields) -> Parsed:
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not JSON: line {error.lineno}, column {error.colno}: {error.msg} (one object a "
            "line is called .jsonl, plain text .txt)"
        ) from None
    if not isinstance(records, list):
        raise ValueError(
            f"{file} holds a JSON {type(records).__name__}; a list of records is needed, or in .jsonl one object a line"
        )
    numbered = [(n, {fields.text: r} if isinstance(r, str) else r) for n, r in enumerate(records, start=1)]
    broken = [
        f"record {n}: a JSON {type(r).__name__} instead of an object or text"
        for n, r in numbered
        if not isinstance(r, dict)
    ]
    return Parsed([(n, r) for n, r in numbered if isinstance(r, dict)], broken, "record")


def _parse_tsv(file: Path, content: str, fields: Fields) -> Parsed:
    lines = enumerate((line.removesuffix("\r") for line in content.split("\n")), start=1)
    return _parse_table([(number, line.split("\t")) for number, line in lines if line], fields)


def _parse_csv(file: Path, content: str, fields: Fields) -> Parsed:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; JSON lines (.jsonl) hold any text") from None
    return _parse_table(rows, fields)


def _parse_table(rows: list[tuple[int, list[str]]], fields: Fields) -> Parsed:
    """Rows as records: columns named by the first row, or numbered from 0 when a field is a number."""
    if not rows:
        return Parsed([], [])
    numbered = any(isinstance(field, int) for field in fields[:3])
    header = list(range(max(len(row) for _, row in rows))) if numbered else rows[0][1]
    body = rows if numbered else rows[1:]
    broken = [
        f"line {n}: {len(row)} cells, the table has {len(header)} columns" for n, row in body if len(row) != len(header)
    ]
    return Parsed([(n, dict(zip(header, row, strict=False))) for n, row in body], broken)


def _documents(file: Path, parsed: Parsed, fields: Fields) -> list[Document]:
    """One document a record; every broken record of the file is named in one error."""
    good: list[Document] = []
    broken, unit = list(parsed.broken), parsed.unit
    for number, record in parsed.records:
        if fields.numbers and type(record.get(fields.completion)) is int:
            record = record | {fields.completion: str(record[fields.completion])}
        found = [field for field in fields[:3] if field in record]
        wrong = [f"{field!r} {flaw}" for field in found if (flaw := _flaw(record[field]))]
        if wrong:
            broken.append(f"{unit} {number}: {', '.join(wrong)}")
        elif found == [fields.text]:
            good.append(Document(f"{file}:{number}", record[fields.text]))
        elif found == [fields.prompt, fields.completion]:
            good.append(Document(f"{file}:{number}", record[fields.prompt], record[fields.completion]))
        else:
            broken.append(f"{unit} {number}: has {[*map(str, record)][:8]}")
    if broken:
        more = [f"and {len(broken) - MOST_NAMED} more"] if len(broken) > MOST_NAMED else []
        raise ValueError(
            f"{file}: {len(broken)} records cannot be used; each needs either {fields.text!r} or both "
            f"{fields.prompt!r} and {fields.completion!r} (the arguments text, prompt, completion rename them):\n  "
            + "\n  ".join(broken[:MOST_NAMED] + more)
        )
    return good


def _flaw(value: object) -> str:
    """What keeps a field's value from being a text; "" when nothing does."""
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not a string"
    lone = any("\ud800" <= c <= "\udfff" for c in value)  # JSON can write half of a surrogate pair, UTF-8 cannot
    return "holds half of a surrogate pair" if lone else ""


PARSERS: dict[str, Callable[[Path, str, Fields], Parsed]] = {
    ".jsonl": _parse_json_lines,
    ".json": _parse_json,
    ".tsv": _parse_tsv,
    ".csv": _parse_csv,
}
