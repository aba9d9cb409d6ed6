"""Files that are whole or absent: atomic writes, checksums, JSON with clear errors."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class WriteError(OSError):
    """`path` could not be written, for `reason`."""

    def __init__(self, path: str | Path, reason: object):
        super().__init__(f"{path} cannot be written: {reason}")
        self.reason = reason


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let what fails inside say in one line that `path` cannot be written, and why: a full disk names no file."""
    try:
        yield
    except WriteError as error:  # of a temporary file within
        raise WriteError(path, error.reason) from error
    except OSError as error:
        raise WriteError(path, error.strerror or error) from error
    except SafetensorError as error:
        raise WriteError(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Ask the disk to remember the names in `folder`: without it a power cut may forget a rename."""
    if os.name == "nt":  # Windows opens no folders, and journals their names itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write `path` so that a reader, or a crash at any moment, sees the old content or the new one, never a part."""
    with naming(path):
        _write(Path(path), content.encode() if isinstance(content, str) else content)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a temporary sibling folder; on success it becomes `path`, on failure it is removed.

    An older `path` is replaced, but only if that loses no file: one that the new folder lacks is somebody else's, and
    raises ValueError.

    Example: `with atomic_folder("run/model") as folder: save_file(tensors, folder / "model.safetensors")`
    """
    path = Path(path)
    with naming(path), _temporary_folder(path) as temporary:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as opened:  # Windows syncs no file that is open for reading only
                    os.fsync(opened.fileno())
            else:
                _sync_folder(file)
        _sync_folder(temporary)
        if path.exists():
            _replace_folder(path, temporary)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(path: Path, new: Path) -> None:
    """Put `new` where `path` stands, in two renames; the old folder is taken back if the second one fails."""
    old, names = (sorted(f.relative_to(root) for f in root.rglob("*") if not f.is_dir()) for root in (path, new))
    if foreign := [str(name) for name in old if name not in set(names)]:
        raise ValueError(
            f"{path} holds files that would be lost: {', '.join(foreign[:5])}{', ...' if foreign[5:] else ''}. "
            "Choose another folder, or move them away"
        )
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".old.{path.name}."))
    os.replace(path, retired / path.name)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(retired / path.name, path)
        retired.rmdir()
        raise
    shutil.rmtree(retired)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a ValueError that names it and the place where it breaks."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else "no such folder"
        raise ValueError(f"{path} does not exist; its folder holds: {beside}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
