"""The kernels' own tests once more, on builds that nobody here would make: with sanitizers, for other processors, by
clang++. Each runs a sample of them in a process of its own; without MINILLM_TEST_SAMPLE=1 it would be all of them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.ops import emulator
from minillm.ops.build import build
from minillm.ops.build_plan import SANITIZE, SOURCES
from minillm.ops.compilers import BuildError, find_cxx

ROOT = Path(__file__).parents[2]
OPS = sorted({path.stem.partition("_")[0] for path in (SOURCES / "cuda").glob("*.cu")})
NATIVE = sorted(Path(__file__).parent.glob("test_native_*.py"))
EMULATED = [
    path
    for path in sorted(Path(__file__).parent.glob("test_emulated*.py"))
    if path.stem not in ("test_emulated_machine", "test_emulated_nvcc", "test_emulated_binding")
]
PLAIN = "not mutant and not accepts and not compile and not thread"  # what runs the kernels, and nothing long besides
PROCESSORS = {"AVX2": "-march=x86-64-v3", "SSE": "-march=x86-64"}


@pytest.fixture
def built_with(monkeypatch):
    """`built_with(kind, flags, cxx)`: the kernels are compiled so, here and in processes started from here."""

    def make(kind: str, flags: str, cxx: str = "") -> None:
        monkeypatch.setenv("MINILLM_CXXFLAGS", flags)
        if cxx:
            monkeypatch.setenv("CXX", cxx)
        try:
            find_cxx()
        except BuildError as error:
            pytest.skip(str(error))
        for op in OPS if kind == "emulated" else [None]:
            build(kind, only=emulator.sources(op) if op else ())

    return make


def run(*arguments, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def assert_pass(files: list[Path], **environment: str) -> None:
    """A sample of the tests in these files passes in a process with this environment."""
    arguments = ("-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", PLAIN)
    done = run(*arguments, *files, MINILLM_TEST_SAMPLE="1", **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:5000]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]


def sanitizers() -> dict[str, str]:
    """The environment in which Python can load what they watch. Skips where g++ has none."""

    def path_of(library: str) -> Path:
        command = [*find_cxx().command, f"-print-file-name={library}"]
        return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    runtimes = [path_of("libasan.so"), path_of("libstdc++.so.6")]  # the second, as the first looks for its `throw`
    if not all(path.is_file() for path in runtimes):
        pytest.skip("g++ has no AddressSanitizer here")
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # Python leaks; fibers have stacks of their own
    return {"LD_PRELOAD": " ".join(map(str, runtimes)), "ASAN_OPTIONS": options}


@pytest.mark.slow
@pytest.mark.parametrize("kind, files", [("emulated", EMULATED), ("cpu", NATIVE)], ids=["emulated", "cpu"])
def test_sanitizers_find_nothing(built_with, kind, files):
    built_with(kind, " ".join(SANITIZE))
    assert_pass(files, **sanitizers())


LOST_GUARDS = """
import sys, torch
from minillm.ops import emulate
machine = emulate.Machine(mutant=int(sys.argv[1]))
call = machine.call
machine.call = lambda *arguments, memory: call(*arguments, memory=[])  # nothing is told to the emulated GPU itself
q, k, v = (torch.randn(1, 1, 37, 48).bfloat16() for _ in range(3))
if sys.argv[1] == "51":
    emulate.attention(q, k, v, stage="v4", machine=machine)
else:
    emulate.attention_backward(q, q, k, v, q, torch.randn(1, 1, 37), machine=machine)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mutant, file", [(51, "attention_v4.cu"), (506, "attention_backward_v1.cu")])
def test_sanitizers_find_a_lost_guard_in_the_kernel(built_with, mutant, file):
    built_with("emulated", " ".join(SANITIZE))
    done = run("-c", LOST_GUARDS, mutant, **sanitizers())
    assert "heap-buffer-overflow" in done.stderr and file in done.stderr, done.stderr[:3000]


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors_compute_the_same(built_with, processor):
    built_with("cpu", PROCESSORS[processor])
    assert_pass(NATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("kind, files", [("emulated", EMULATED), ("cpu", NATIVE)], ids=["emulated", "cpu"])
def test_clang_makes_the_same(built_with, kind, files):
    if not shutil.which("clang++"):
        pytest.skip("there is no clang++")
    built_with(kind, "", cxx="clang++")
    assert_pass(files)
