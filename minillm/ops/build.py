"""Build the native kernels with this machine's g++ and nvcc when asked to, never on import.

What is built is kept under a digest of all that decides what it is (build_plan.py, build_cache.py): what other sources
or flags gave is never used.
"""

import datetime
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minillm.files import WriteError, atomic_folder
from minillm.ops.build_cache import cache_folder, locked, remove_remains
from minillm.ops.build_plan import TORCH, Plan, check, make_plan
from minillm.ops.compilers import BuildError, Compiler, Step, find_cxx, find_nvcc, run_steps

__all__ = ["BuildError", "build", "built", "obstacle"]


def say(message: str) -> None:
    """How a build tells its steps."""
    print(f"minillm: {message}", file=sys.stderr, flush=True)


def built(kind: str, *, defines: Sequence[str] = (), sanitize: bool = False, only: Sequence[str] = ()) -> Path | None:
    """The library that `build` would return if it is there already, else None. Takes milliseconds, runs no compiler."""
    plan = make_plan(kind, defines, sanitize, only)
    try:
        library = cache_folder() / plan.name / "lib.so"
    except BuildError:  # nowhere to keep anything, so nothing is there; `build` says why
        return None
    return library if library.is_file() else None


def build(
    kind: str,
    *,
    defines: Sequence[str] = (),
    sanitize: bool = False,
    only: Sequence[str] = (),
    say: Callable[[str], None] = say,
) -> Path:
    """The path of the library of this kind ("cpu", "cuda" or "emulated"), compiled unless it is there already.

    defines: macros such as "MUTANT=3". sanitize: with AddressSanitizer and UBSan (not for cuda). only: names of .cu
    files, instead of all (emulated). Of two processes that build the same at once, one waits for the other's result.
    Raises BuildError with cause and remedy; nothing but a log is then left in the cache.
    """
    if found := built(kind, defines=defines, sanitize=sanitize, only=only):
        return found
    plan = make_plan(kind, defines, sanitize, only)
    try:
        return _build_in(cache_folder(), plan, _compilers(plan), say)
    except BuildError as error:
        raise BuildError(f"the {kind} kernels cannot be built: {error}") from error.__cause__


def obstacle(kind: str) -> str:
    """What would keep `build` from compiling this kind here, as far as can be seen without trying; "" if nothing."""
    try:
        _compilers(make_plan(kind))
    except BuildError as error:
        return str(error)
    return ""


def _compilers(plan: Plan) -> dict[str, Compiler]:
    """What compiles the plan; BuildError if that, or anything else that it needs, is not there."""
    check(plan)
    return {"cxx": find_cxx(), **({"nvcc": find_nvcc()} if plan.kind == "cuda" else {})}


def _build_in(cache: Path, plan: Plan, compilers: dict[str, Compiler], say: Callable[[str], None]) -> Path:
    library = cache / plan.name / "lib.so"
    busy = functools.partial(say, f"another process is building the {plan.kind} kernels: waiting for it")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{plan.name}.lock", busy):
            if not library.is_file():
                remove_remains(cache, plan.name)
                with atomic_folder(library.parent) as folder:
                    _fill(folder, plan, compilers, say)
                say(f"built {library}")
    except OSError as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror or error
        raise BuildError(f"{cache} cannot be written: {reason}. Set MINILLM_CACHE to a folder that can") from error
    return library


def _fill(folder: Path, plan: Plan, compilers: dict[str, Compiler], say: Callable[[str], None]) -> None:
    """Make lib.so, build.json and build.log in `folder`; on failure the log is kept, as <name>.log beside it."""
    start, log, objects = time.perf_counter(), folder / "build.log", folder / "objects"
    objects.mkdir()
    log.touch()
    say(f"building the {plan.kind} kernels with {' and '.join(map(str, compilers.values()))}; files: {len(plan.units)}")

    def finished(name: str, seconds: float) -> None:
        say(f"  {name:<32} {seconds:6.1f} s")

    try:
        run_steps([_compilation(plan, compilers, unit, objects) for unit in plan.units], plan.root, log, finished)
        run_steps([_linking(plan, compilers, objects, folder / "lib.so")], plan.root, log, finished)
        if not (folder / "lib.so").is_file():
            raise BuildError("the linker reported success and made no lib.so")
        if make_plan(plan.kind, *plan.options) != plan:
            raise BuildError(f"the sources in {plan.root} changed while they were compiled. Build again")
    except BuildError as error:
        kept = shutil.copy(log, folder.parent / f"{plan.name}.log")
        raise BuildError(f"{error}\nThe whole log: {kept}") from error.__cause__
    shutil.rmtree(objects)
    _describe(folder / "build.json", plan, compilers, time.perf_counter() - start)


def _describe(path: Path, plan: Plan, compilers: dict[str, Compiler], seconds: float) -> None:
    facts = {
        "kind": plan.kind,
        "built": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "compilers": {name: str(compiler) for name, compiler in compilers.items()},
        "torch": torch.__version__,
        "units": plan.units,
        "flags": plan.flags,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")


def _compilation(plan: Plan, compilers: dict[str, Compiler], unit: str, objects: Path) -> Step:
    folder = unit.rpartition("/")[0]
    command = _nvcc(compilers) if unit.endswith(".cu") and "nvcc" in compilers else compilers["cxx"].command
    headers = () if folder else ("-isystem", str(TORCH / "include"))
    made = _object(unit, objects)
    return Step(unit, (*command, *plan.flags[folder], *headers, "-c", unit, "-o", str(made)), made.with_suffix(".txt"))


def _linking(plan: Plan, compilers: dict[str, Compiler], objects: Path, library: Path) -> Step:
    command = _nvcc(compilers) if "nvcc" in compilers else compilers["cxx"].command
    parts = [str(_object(unit, objects)) for unit in plan.units]
    place = () if plan.kind == "emulated" else (f"-L{TORCH / 'lib'}",)
    return Step("lib.so", (*command, "-o", str(library), *parts, *place, *plan.flags["link"]), objects / "link.txt")


def _object(unit: str, objects: Path) -> Path:
    return objects / f"{unit.replace('/', '_')}.o"


def _nvcc(compilers: dict[str, Compiler]) -> tuple[str, ...]:
    """nvcc; the host's part is compiled by what CXX asks for, where that is one word."""
    host = compilers["cxx"].command
    return (*compilers["nvcc"].command, *(("-ccbin", host[0]) if os.environ.get("CXX") and len(host) == 1 else ()))
