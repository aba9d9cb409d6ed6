"""Two corpora that every machine with Python already has: its documentation (English) and its library's source (code).

They are two domains for one small model: learn the first, then adapt to the second and see what that cost the first.
No text stands in both: docstrings belong to the documentation and are cut out of the source.
"""

import ast
import hashlib
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data import Document

SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),  # not the standard library, or not source
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),  # not read as a library
    *("encodings", "msilib"),  # generated tables
}
SKIPPED_FILES = {"html/entities.py"}  # a generated table
REPEAT = 80  # characters: a shorter paragraph may stand in two documents by chance ("Return repr(self).")
NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, *NAMED)  # what can have a docstring


def python_documentation(limit: int = 2_000_000, folder: Path | None = None) -> list[Document]:
    """Python's own manual as English text: the topics behind `help("for")` and the library's docstrings.

    One document for each topic and module, in a fixed order, about `limit` characters in all. A paragraph that already
    stood in an earlier document is dropped: some topics contain others whole, which would leak held-out text.
    `folder` replaces the running Python's standard library by another folder of Python files (then without topics).
    """
    topics: dict[str, str] = {}
    if folder is None:
        from pydoc_data.topics import topics
    documents = [Document(f"topic {name}", text) for name, text in topics.items()]
    for name, source in _sources(folder):
        if text := "\n\n".join(_docstrings(_parse(source, name), _module(name))):
            documents.append(Document(f"docstrings of {_module(name)}", text))
    return _up_to(limit, _without_repeats(documents))


def standard_library_source(
    limit: int = 2_000_000, folder: Path | None = None, without: Iterable[Document] = ()
) -> list[Document]:
    """Source code of the standard library without its docstrings, one document for each file, in a fixed order.

    About `limit` characters; `folder` as in `python_documentation`. Paragraphs that stand in the documents `without`
    are dropped too: a few modules keep their manual in an ordinary string.
    """
    documents = (Document(name, without_docstrings(source, name)) for name, source in _sources(folder))
    return _up_to(limit, _without_repeats(documents, without))


def without_docstrings(source: str, name: str = "source") -> str:
    """Python source whose docstrings are cut out; a body that held nothing else becomes `...`, so it still parses."""
    lines = [line + "\n" for line in source.split("\n")]  # splitlines also breaks at form feeds, ast does not
    for node in ast.walk(_parse(source, name)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            first, last = text.lineno - 1, text.end_lineno - 1
            before = lines[first].encode()[: text.col_offset].decode()  # ast counts columns in UTF-8 bytes
            after = lines[last].encode()[text.end_col_offset :].decode().lstrip(" ;")
            if len(node.body) == 1 and not isinstance(node, ast.Module):
                after = "..." + after
            kept = before + after
            # every line keeps its place in the list, so that the positions of later docstrings stay right
            lines[first : last + 1] = [kept if kept.strip() else ""] + [""] * (last - first)
    return "".join(lines).strip() + "\n"


def _sources(root: Path | None) -> Iterator[tuple[str, str]]:
    """(path, text) of each Python file, ordered by the hash of its path: any beginning is a fair sample of them all."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in SKIPPED_FOLDERS and not sub.startswith("config-")]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    names = [name for name in names if name not in SKIPPED_FILES and not name.startswith("_sysconfigdata")]
    if not names:
        raise ValueError(
            f"{root} holds no Python source files (a zipped or stripped Python?): "
            "use a Python with its standard library as .py files, or your own texts with `minillm pretrain`"
        )
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        with tokenize.open(root / name) as file:  # honours "# -*- coding: ... -*-"
            yield name, file.read()


def _parse(source: str, name: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's strings are not the reader's business
        return ast.parse(source, filename=name)


def _module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Each docstring below `node` under its full name, e.g. "json.dumps", in the order of the file."""
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
        yield f"{name}\n{text}"
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, NAMED) else name)


def _without_repeats(documents: Iterable[Document], earlier: Iterable[Document] = ()) -> Iterator[Document]:
    """The documents without paragraphs that they, or the `earlier` ones, already had; nothing is left of some."""
    seen = {key for document in earlier for key in map(_key, document.text.split("\n\n")) if len(key) >= REPEAT}
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            if (key := _key(paragraph)) not in seen:
                kept.append(paragraph)
            if len(key) >= REPEAT:
                seen.add(key)
        if text := "\n\n".join(kept).strip():
            yield Document(document.name, text)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())  # indentation and line breaks do not make a text new


def _up_to(limit: int, documents: Iterable[Document]) -> list[Document]:
    """The first documents that together hold at most `limit` characters; one that does not fit is passed over."""
    kept, size = [], 0
    for document in documents:
        if size + len(document.text) <= limit:
            kept.append(document)
            size += len(document.text)
        if size > 0.99 * limit:
            break
    return kept
