"""The compilers of this machine: where they are, whether they are new enough, and running several at once."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

OLDEST_CXX = 10  # g++ and clang++ know -std=c++20 from 10 on
OLDEST_NVCC = (12, 0)  # -std=c++20, and all of sm_90a
TAIL = 20  # lines of a failed compiler's output that the error repeats


class BuildError(ValueError):
    """The native kernels cannot be built here: what is wrong, and what would help."""


class Compiler(NamedTuple):
    """The words that start it, and the version it tells."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} {self.version}"


class Step(NamedTuple):
    """One run of a compiler: what it makes, the command, and the file that takes what it prints."""

    name: str
    command: tuple[str, ...]
    output: Path


def find_cxx() -> Compiler:
    """The C++ compiler that CXX names, else g++; BuildError if there is none, or it does not know C++20."""
    command = words_in("CXX") or ("g++",)
    if not shutil.which(command[0]):
        where = f"CXX={os.environ['CXX']} names no program" if os.environ.get("CXX") else "g++ is not on the PATH"
        raise BuildError(
            f"there is no C++ compiler: {where}. Install g++ {OLDEST_CXX} or newer (apt install g++), or set CXX to a "
            "compiler"
        )
    printed = _ask((*command, "-dM", "-E", "-x", "c++", os.devnull))
    macros = dict(re.findall(r"#define __(\w+?)__ (\d+)\s", printed))
    names = ("clang_major", "clang_minor", "clang_patchlevel")
    if names[0] not in macros:
        names = ("GNUC", "GNUC_MINOR", "GNUC_PATCHLEVEL")
    if names[0] not in macros:
        raise BuildError(f"{shlex.join(command)} is neither g++ nor clang++: set CXX to one of them")
    compiler = Compiler(command, ".".join(macros.get(name, "0") for name in names))
    if int(macros[names[0]]) < OLDEST_CXX:
        raise BuildError(
            f"{compiler} is too old: the kernels are C++20, which needs g++ or clang++ {OLDEST_CXX}. Set CXX"
        )
    return compiler


def find_nvcc() -> Compiler:
    """nvcc: what NVCC names, else on PATH, in CUDA_HOME, in /usr/local/cuda; BuildError if none, or too old."""
    asked = words_in("NVCC")
    home = os.environ.get("CUDA_HOME", "")
    places = asked[:1] or ("nvcc", *([f"{home}/bin/nvcc"] if home else []), "/usr/local/cuda/bin/nvcc")
    found = next(filter(None, map(shutil.which, places)), None)
    if not found:
        where = "NVCC names no program" if asked else "looked on PATH, in CUDA_HOME and in /usr/local/cuda"
        raise BuildError(
            f"there is no nvcc: {', '.join(places)} ({where}). Install NVIDIA's CUDA toolkit "
            f"{_dotted(OLDEST_NVCC)} or newer, or set NVCC or CUDA_HOME"
        )
    command = (found, *asked[1:])
    printed = _ask((*command, "--version"))
    version = re.search(r"release (\d+)\.(\d+)", printed)
    if not version:
        printed = printed.strip()[:200]
        raise BuildError(f"{shlex.join(command)} --version tells no release, but {printed!r}. Set NVCC")
    compiler = Compiler(command, _dotted(version.groups()))
    if tuple(map(int, version.groups())) < OLDEST_NVCC:
        raise BuildError(f"{compiler} is too old: {_dotted(OLDEST_NVCC)} or newer is needed. Set NVCC or CUDA_HOME")
    return compiler


def _dotted(numbers: Sequence) -> str:
    return ".".join(map(str, numbers))


def words_in(variable: str) -> tuple[str, ...]:
    """The environment variable as words of a command, as in CXX="ccache g++"."""
    try:
        return tuple(shlex.split(os.environ.get(variable, "")))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]} cannot be split: {error}") from None


def _ask(command: Sequence[str]) -> str:
    """What a compiler prints about itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        printed = (done.stderr or done.stdout).strip()[-500:]
        raise BuildError(f"{shlex.join(command)} failed with exit code {done.returncode}: {printed}")
    return done.stdout


def run_steps(steps: Sequence[Step], folder: Path, log: Path, finished: Callable[[str, float], None]) -> None:
    """Run all steps in `folder`, at most one per processor at a time, and append commands and output to `log`.

    finished(name, seconds) is told each end. A step that fails, or Ctrl-C, ends the others: BuildError.
    """
    running = Running(folder)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for future in as_completed([pool.submit(running.run, step) for step in steps]):
                step, code, seconds = future.result()
                printed = step.output.read_text(errors="replace")
                with open(log, "a") as file:
                    file.write(f"$ {shlex.join(step.command)}\n{printed}[{code}] {seconds:.1f} s\n\n")
                if code:
                    raise BuildError(_describe(step, code, printed))
                finished(step.name, seconds)
        finally:
            running.end()


class Running:
    """The processes that run now. Threads start them, because Ctrl-C reaches the main thread only, and so no process
    between its start and its entry here."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.ended, self.lock = folder, set(), False, threading.Lock()

    def run(self, step: Step) -> tuple[Step, int, float]:
        """Run a step to its end: (step, exit code, seconds)."""
        start = time.perf_counter()
        with self.lock:
            if self.ended:
                return step, -signal.SIGKILL, 0.0
            process = _start(step, self.folder)
            self.processes.add(process)
        code = process.wait()
        with self.lock:
            self.processes.remove(process)
        return step, code, time.perf_counter() - start

    def end(self) -> None:
        """Kill what runs, with all that it started, and start nothing more."""
        with self.lock:
            self.ended = True
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _start(step: Step, folder: Path) -> subprocess.Popen:
    """Start a step as the head of a process group of its own: g++ starts others, which must end with it."""
    with open(step.output, "wb") as output:
        try:
            return subprocess.Popen(
                step.command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BuildError(f"{step.command[0]} cannot be started: {error.strerror}") from None


def _describe(step: Step, code: int, printed: str) -> str:
    lines = printed.strip().splitlines() or ["(it printed nothing)"]
    first = f"{step.command[0]} failed on {step.name} with exit code {code}"
    if "No space left on device" in printed:
        first += ": the disk is full. Free some room, or set MINILLM_CACHE, and TMPDIR, to folders that have it"
    cut = f" (the last {TAIL} lines of {len(lines)})" if len(lines) > TAIL else ""
    return "\n".join([f"{first}. It said{cut}:", *(f"  {line}" for line in lines[-TAIL:])])
