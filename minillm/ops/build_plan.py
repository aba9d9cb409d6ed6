"""What each native library is made of: sources, flags, and a digest of all that decides what comes out.

Three libraries come of the sources in csrc/:
  cpu       binding.cpp (the only file with headers of torch) and cpu/*.cpp
  cuda      the same, and cuda/*.cu through nvcc
  emulated  cuda/*.cu through g++, with csrc/emulator in the place of CUDA: no torch, no GPU; loaded with ctypes

MINILLM_CXXFLAGS gives the C++ compiler more flags, after ours: -march=x86-64-v3, say, for a cluster whose machines have
no more in common, or -O0 -g for a debugger. MINILLM_CUDA_ARCHS names nvcc's architectures. Both belong to the digest.
"""

import functools
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.ops.compilers import BuildError, words_in

SOURCES = Path(__file__).parent / "csrc"
TORCH = Path(torch.__file__).parent
KINDS = {"cpu": ("", "cpu"), "cuda": ("", "cpu", "cuda"), "emulated": ("", "emulator", "cuda")}  # -> its source folders

CXX = ("-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wextra", "-I.")
SANITIZE = ("-Og", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CPU = (*CXX, "-O3", "-march=native")  # no -ffast-math: what should be fast is written with vectors, infinities count
BINDING = (*CXX, "-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000")  # torch 2.10's stable ABI, which later ones keep
EMULATED = ("-x", "c++", *CXX, "-Wno-unknown-pragmas", "-Iemulator", "-O1")
CUDA = ("-std=c++20", "-O3", "-I.", "-Xcompiler=-fPIC", "-Xptxas=-v")  # -v: registers and spills, into build.log
ARCHS = "sm_80,sm_90a,compute_90"  # machine code for A100 and H100/H200, and PTX for what comes after


@dataclass(frozen=True)
class Plan:
    """All that `build` needs to know of a library. No path of this machine is in its flags."""

    kind: str
    root: Path  # the units' folder, in which compilers run
    units: tuple[str, ...]  # sources to compile; the one that takes longest comes first
    flags: dict[str, tuple[str, ...]]  # for each folder of units ("" has the binding), and "link"
    name: str  # of its folder in the cache
    options: tuple  # what make_plan was given besides the kind


def make_plan(kind: str, defines: Sequence[str] = (), sanitize: bool = False, only: Sequence[str] = ()) -> Plan:
    """The plan of a library of this kind; the arguments are those of `build`. ValueError if they do not fit."""
    if kind not in KINDS:
        raise ValueError(f"there are no {kind!r} kernels: choose one of {', '.join(KINDS)}")
    if sanitize and kind == "cuda":
        raise ValueError("sanitize=True: ours is for cpu and emulated; NVIDIA's compute-sanitizer checks cuda kernels")
    files = [file for folder in KINDS[kind] for file in _files(folder) if (kind, file) != ("emulated", "binding.cpp")]
    units = [file for file in files if file.endswith(".cu" if kind == "emulated" else (".cpp", ".cu"))]
    if only:
        chosen = _choose(kind, units, only)
        files, units = [file for file in files if file not in units or file in chosen], chosen
    units.sort(key=lambda unit: (unit != "binding.cpp", -(SOURCES / unit).stat().st_size))  # torch's headers are long
    extra = (*SANITIZE * sanitize, *words_in("MINILLM_CXXFLAGS"))
    flags = _flags(kind, tuple(f"-D{name}" for name in defines), extra)
    name = f"{kind}-{_digest(kind, files, flags)}"
    return Plan(kind, SOURCES, tuple(units), flags, name, (tuple(defines), sanitize, tuple(only)))


def _files(folder: str) -> list[str]:
    """The sources and headers in a folder of csrc, relative to csrc."""
    found = (file for file in (SOURCES / folder).glob("*") if file.suffix in (".h", ".cuh", ".cpp", ".cu"))
    return sorted(file.relative_to(SOURCES).as_posix() for file in found)


def _choose(kind: str, units: list[str], only: Sequence[str]) -> list[str]:
    named = {Path(unit).name: unit for unit in units}
    if kind != "emulated":
        raise ValueError(f"only={tuple(only)}: the {kind} kernels are built all together; only emulated ones apart")
    if unknown := sorted(set(only) - set(named)):
        raise ValueError(f"only: there is no {', '.join(unknown)}; choose of {', '.join(named)}")
    return [named[name] for name in dict.fromkeys(only)]


def _digest(kind: str, files: list[str], flags: dict[str, tuple[str, ...]]) -> str:
    """Of the sources' contents, the flags, torch's major.minor and the processor's instructions."""
    contents = {file: hashlib.sha256((SOURCES / file).read_bytes()).hexdigest() for file in sorted(files)}
    linked = [".".join(torch.__version__.split(".")[:2]), _instructions()] if kind != "emulated" else []
    parts = [flags, contents, linked, platform.machine()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@functools.cache
def _instructions() -> str:
    """What -march=native depends on: the instructions that the first processor of this machine knows."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except FileNotFoundError:  # not Linux, where nothing is built
        return ""


def _flags(kind: str, defines: tuple[str, ...], extra: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The flags of a library, for each folder of its units; `extra` for the C++ compiler alone."""
    if kind == "emulated":
        return {"cuda": (*EMULATED, *defines, *extra), "link": ("-shared", "-pthread", *extra)}
    binding, cpu = (*BINDING, *defines, *extra), (*CPU, *defines, *extra)
    libraries = ("-ltorch_cpu", "-lc10")
    if kind == "cpu" and "-DMINILLM_EMULATED" in defines:  # the launchers that binding.cpp then calls are elsewhere
        return {"": binding, "cpu": cpu, "link": ("-shared", "-pthread", *extra, *libraries)}
    if kind == "cpu":
        # Never -ffast-math here: g++ 12 would then link code that makes the whole process round tiny numbers to 0.
        return {"": binding, "cpu": cpu, "link": ("-shared", "-pthread", *extra, "-Wl,-z,defs", *libraries)}
    if (TORCH / "lib" / "libtorch_cuda.so").exists():
        # The binding asks for torch's CUDA stream by a weak symbol, for which alone the linker would load no library.
        libraries = ("-Xlinker=--no-as-needed", "-ltorch_cuda", *libraries)
    cuda = (*CUDA, *_gencode(os.environ.get("MINILLM_CUDA_ARCHS") or ARCHS), *defines)
    link = ("-shared", "-Xlinker=-z,defs", *libraries)
    return {"": (*binding, "-DMINILLM_CUDA"), "cpu": cpu, "cuda": cuda, "link": link}


def _gencode(archs: str) -> list[str]:
    names = re.split(r"[,\s]+", archs.strip())
    if bad := [name for name in names if not re.fullmatch(r"(sm|compute)_\d+[af]?", name)]:
        raise ValueError(f"MINILLM_CUDA_ARCHS={archs}: {', '.join(bad)} should be like sm_90a, or compute_90 for PTX")
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]


def check(plan: Plan) -> None:
    """Raise BuildError where no compiler would say it well: not Linux, missing sources, a torch without headers."""
    if sys.platform != "linux":
        raise BuildError(f"this is {sys.platform}, and they are for Linux. The torch implementations run everywhere")
    needed = {"cpu": ("binding.cpp", "cpu/"), "cuda": ("binding.cpp", "cpu/", "cuda/"), "emulated": ("cuda/",)}
    missing = [name for name in needed[plan.kind] if not any(unit.startswith(name) for unit in plan.units)]
    if missing:
        raise BuildError(f"{plan.root} lacks the sources {', '.join(missing)}. Install minillm again")
    header = TORCH / "include" / "torch" / "csrc" / "stable" / "library.h"
    if plan.kind != "emulated" and not header.is_file():
        raise BuildError(f"torch {torch.__version__} is without its C++ headers: {header} is missing. Install it again")
