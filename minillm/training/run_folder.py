"""The folder that holds one run: what was asked for, where it ran, what it measured."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from minillm.files import atomic_write, naming, read_json, write_json
from minillm.training.distributed import from_main

FORMAT = 1  # of config.json; raise it when a reader of the old layout would misunderstand the new one
PARTS = ("config.json", "metrics.jsonl", "checkpoints")  # any of these says that a folder holds a run


def create_run_folder(path: str | Path, config: dict[str, Any]) -> Path:
    """Make `path` with `config.json` and `environment.json`; a folder that already holds a run is refused.

    Under torchrun every process calls it and the main one writes.
    """
    path = Path(path)

    def write() -> None:
        refuse_a_used_folder(path)
        write_json(path / "environment.json", environment())
        write_json(path / "config.json", {"format_version": FORMAT, **config})  # last: it marks the folder as a run

    from_main(write)
    return path


def refuse_a_used_folder(path: Path, parts: tuple[str, ...] = PARTS) -> None:
    """Raise ValueError if `path` holds any of `parts`, or if no folder can be made or written there."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{path} cannot be the folder of a run: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be the folder of a run: you may not write in {there}; choose another folder")
    if found := [part for part in parts if (path / part).exists()]:
        raise ValueError(
            f"{path} already holds a run ({', '.join(found)}): continue it where its command has --resume (in Python: "
            "Trainer.resume()), choose another folder, or delete it"
        )


def read_run_config(path: str | Path) -> dict[str, Any]:
    """The config that `create_run_folder` was given; ValueError if another version of minillm wrote it."""
    config = read_json(Path(path) / "config.json")
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path}/config.json has format version {version} and this minillm reads version {FORMAT}: "
            "use the minillm named in the run's environment.json, or start the run anew"
        )
    return config


def environment() -> dict[str, Any]:
    """What a result may depend on besides the config: versions, machine, threads, device, commit."""
    packages = ("minillm", "numpy", "safetensors", "sentencepiece")
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,  # with the build's name, such as +cpu
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "commit": git_commit(Path(__file__).parents[2]),
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, read from git's own files; None where it is no plain checkout."""
    head = folder / ".git" / "HEAD"
    if not head.is_file():
        return None
    reference = head.read_text().strip()
    if not reference.startswith("ref: "):
        return reference
    name = reference.removeprefix("ref: ")
    if (loose := folder / ".git" / name).is_file():
        return loose.read_text().strip()
    packed = folder / ".git" / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


class Records:
    """A file of one JSON object per line, each with its "step", that grows while a run goes on."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0  # of the records that this object wrote, or found when it cut

    def write(self, record: dict[str, Any]) -> None:
        """Add a line. It has left this process when the call returns, so that a kill cannot take it back."""
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.count += 1

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that a crash cut short is left out, any other broken line is a ValueError."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="backslashreplace")  # damaged bytes are no JSON either
        *lines, _torn = text.split("\n")  # after the last newline stands nothing
        return [self._parse(number, line) for number, line in enumerate(lines, 1)]

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number} is not JSON: {error.msg}: {line[:80]!r}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f'{self.path}, line {number} is no record with a "step": {line[:80]!r}')
        return record

    def cut(self, step: int) -> None:
        """Forget what was recorded after `step`."""
        if self.path.exists():
            kept = [record for record in self.read() if record["step"] <= step]
            self.count = len(kept)
            atomic_write(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


class Timing(Records):
    """The records of how fast a run is, gathered over some steps and then written."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.seconds, self.tokens = 0.0, 0.0

    def cut(self, step: int) -> None:
        """Forget what was recorded after `step`. How fast a run was decides nothing: a broken file is set aside."""
        try:
            super().cut(step)
        except ValueError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            os.replace(self.path, aside)
            warnings.warn(f"{error}; it is kept as {aside.name}, and the run's times are counted anew", stacklevel=2)

    def add(self, seconds: float, tokens: float) -> None:
        """Count in one step."""
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens

    def write_since_last(self, step: int, device: torch.device) -> None:
        """Write the sums since the last call, and the process's peak memory so far."""
        speed, memory = self.tokens / self.seconds, peak_memory(device)
        self.write({"step": step, "seconds": self.seconds, "tokens_per_second": speed, "peak_memory_bytes": memory})
        self.seconds, self.tokens = 0.0, 0.0


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch held on a GPU, or this process in main memory, since it started; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage would count what the parent process held when it started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    if sys.platform == "win32":
        return None
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it is in KiB
