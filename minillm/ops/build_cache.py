"""Where built kernels are kept: one folder for each combination of sources, flags and machine, whole or absent.

<cache>/cpu-0123456789abcdef/lib.so, build.json (what, when, by which compiler), build.log (every command, its output)
<cache>/cpu-0123456789abcdef.lock   while a process builds it
<cache>/cpu-0123456789abcdef.log    of the last attempt, if that failed
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from minillm.ops.compilers import BuildError

# The folders and files above, and the temporary folders of builds that were killed, which begin with a dot.
OURS = re.compile(r"(?:\.(?:old\.)?)?(?P<name>(?:cpu|cuda|emulated)-[0-9a-f]{16})(?:\.\w+)?")


def cache_folder() -> Path:
    """MINILLM_CACHE, else minillm in XDG_CACHE_HOME, else ~/.cache/minillm; BuildError if there is no home either."""
    if asked := os.environ.get("MINILLM_CACHE"):
        return Path(asked).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise BuildError(f"there is no place to keep what is built: {base} is not a full path. Set MINILLM_CACHE")
    return base / "minillm"


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path` alone; `busy` is called, and may raise, before waiting for another process.

    The operating system frees the lock of a process that ends, however it ends: a file left behind locks nothing.
    """
    handle = _lock(path, busy)
    try:
        yield
    finally:
        path.unlink()  # while it is held; who waits for this file then finds that the path names another one
        os.close(handle)


def _lock(path: Path, busy: Callable[[], None]) -> int:
    import fcntl  # here, because Windows has none

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # removed by its last holder, as other files are after it
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def remove_remains(cache: Path, name: str) -> int:
    """Remove what earlier attempts left of `name` beside its folder, whose lock the caller holds; their bytes."""
    beside = [path for path in _ours(cache).get(name, []) if path.name not in (name, f"{name}.lock")]
    return sum(map(_remove, beside))


def clean() -> tuple[int, list[str]]:
    """Remove all that was built, and nothing else that is in the cache: (bytes, names left alone: being built now)."""
    cache, removed, left = cache_folder(), 0, []
    for name in _ours(cache):
        try:
            with locked(cache / f"{name}.lock", busy=_give_up):
                removed += remove_remains(cache, name) + _remove(cache / name)
        except BlockingIOError:
            left.append(name)
    with contextlib.suppress(OSError):  # it does not exist, or holds files of others
        cache.rmdir()
    return removed, left


def _give_up() -> None:
    raise BlockingIOError


def libraries() -> list[Path]:
    """Every library in the cache; build.json beside it says what it is."""
    cache = cache_folder()
    return [path for name in _ours(cache) if (path := cache / name / "lib.so").is_file()]


def _ours(cache: Path) -> dict[str, list[Path]]:
    """name -> all in the cache that belongs to it."""
    found: dict[str, list[Path]] = {}
    for path in sorted(cache.iterdir()) if cache.is_dir() else []:
        if match := OURS.fullmatch(path.name):
            found.setdefault(match["name"], []).append(path)
    return found


def _remove(path: Path) -> int:
    """Remove a file, or a folder with all in it, if it is there; how many bytes that were."""
    if path.is_dir() and not path.is_symlink():
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        shutil.rmtree(path)
        return size
    size = path.lstat().st_size if os.path.lexists(path) else 0
    path.unlink(missing_ok=True)
    return size
