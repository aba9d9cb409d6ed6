"""The emulated GPU: runs the CUDA kernels on this processor, slowly, and watches them.

The same .cu files that nvcc compiles run here, each thread of a block in turn (csrc/emulator). A barrier that not all
threads reach, a race in shared memory, a read outside the tensors: each is an EmulationError that names the line.
"""

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillm.ops.build import build
from minillm.ops.build_plan import SOURCES

SCHEDULES = ("forward", "reverse", "shuffled")  # the order in which the threads of a block take their turns
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INVALID_VALUE = 1  # cudaErrorInvalidValue: the kernel does not take this shape


class EmulationError(RuntimeError):
    """A kernel did what it must not do on a GPU."""


def sources(op: str) -> tuple[str, ...]:
    """The files in csrc/cuda with the kernels of an op: attention.cu, attention_v1.cu, ..."""
    return tuple(sorted(path.name for path in (SOURCES / "cuda").glob(f"{op}*.cu")))


class Counts(ctypes.Structure):
    """What the kernels of one call did: see csrc/emulator/report.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("global_read", "global_written", "shared_read", "shared_written"),
            *("shuffles", "mma", "barriers", "blocks", "conflicts"),
        )
    ]


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    """The emulated kernels of attention, compiled by g++ on first use, or those at `path`."""
    loaded = ctypes.CDLL(str(path or build("emulated", only=sources("attention"))))
    loaded.emulator_region.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.emulator_error.restype = loaded.emulator_trace.restype = ctypes.c_char_p
    loaded.emulator_counts.restype = ctypes.POINTER(Counts)
    loaded.emulator_reached_mutant.restype = ctypes.c_bool
    return loaded


@dataclass
class Machine:
    """How the emulated GPU runs a call, and after it what was seen.

    schedule: the order in which the threads of a block take their turns; a right kernel does not care.
    mutant: the number of a line that is left out (csrc/cuda/MUTANTS.md).
    traced_block: its number in the grid; `trace` then tells what it did from barrier to barrier.
    path: a library of another build.
    """

    schedule: str = "forward"
    seed: int = 0
    mutant: int = 0
    traced_block: int = -1
    path: Path | None = None
    counts: Counts | None = None
    trace: str = ""
    reached_mutant: bool = False

    def call(self, name: str, arguments: ctypes.Structure, *rest, memory: Iterable[Tensor]) -> None:
        """Run the launcher `name`; its kernels may touch the storage of the tensors in `memory` and nothing else.

        ValueError: the kernel does not take this shape. EmulationError: it did what it must not do.
        """
        if self.schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        kernels = library(self.path)
        kernels.emulator_configure(SCHEDULES.index(self.schedule), self.seed, self.mutant, self.traced_block)
        for tensor in memory:
            storage = tensor.untyped_storage()
            kernels.emulator_region(storage.data_ptr(), storage.nbytes())
        status = kernels[name](ctypes.byref(arguments), *rest, None)
        self.counts = Counts.from_buffer_copy(kernels.emulator_counts().contents)
        self.trace = kernels.emulator_trace().decode()
        self.reached_mutant = kernels.emulator_reached_mutant()
        if status == INVALID_VALUE:
            raise ValueError(f"{name} does not take this shape or dtype")
        if status:
            raise EmulationError(kernels.emulator_error().decode() or f"{name} failed with cudaError {status}")
