"""A build that fails: one clear error with cause and remedy, and nothing half-built, whatever happens in between."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.ops import build_plan, compilers
from minillm.ops.build import BuildError, build, built

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux")
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")


def quiet(_message: str) -> None:
    pass


def fails(kind: str, match: str, cache: Path, rest: tuple[str, ...] = ()) -> str:
    """Building fails with a message that matches, and leaves in the cache nothing but what `rest` names."""
    with pytest.raises(BuildError, match=match) as caught:
        build(kind, say=quiet)
    assert str(caught.value).startswith(f"the {kind} kernels cannot be built: ")
    assert built(kind) is None
    assert tuple(p.name for p in cache.iterdir() if cache.is_dir()) == rest if cache.exists() else not rest
    return str(caught.value)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


MACROS = "#!/bin/sh\nprintf '#define __%s__ %s \\n' {}\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            None,
            r"no C\+\+ compiler: CXX=\S+ names no program. Install g\+\+ 10 or newer \(apt install g\+\+\), or set CXX",
        ),
        (MACROS.format("GNUC 9 GNUC_MINOR 4"), r"compiler 9.4.0 is too old: .* needs g\+\+ or clang\+\+ 10. Set CXX"),
        (MACROS.format("GNUC 4 clang_major 9"), r"compiler 9.0.0 is too old"),
        ("#!/bin/sh\necho hello\n", r"compiler is neither g\+\+ nor clang\+\+: set CXX to one of them"),
        ("#!/bin/sh\necho 'no licence' >&2; exit 3\n", r"compiler -dM .* failed with exit code 3: no licence"),
        ("not a program", r"compiler cannot be started: Exec format error"),
    ],
    ids=["absent", "old g++", "old clang++", "another program", "broken", "not a program"],
)
def test_no_usable_compiler(sources, tmp_path, monkeypatch, text, match):
    path = tmp_path / "compiler"
    if text is not None:
        script(path, text)
    monkeypatch.setenv("CXX", str(path))
    fails("cpu", match, tmp_path / "cache")
    fails("emulated", match, tmp_path / "cache")


def test_no_compiler_on_the_path(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    fails("cpu", r"there is no C\+\+ compiler: g\+\+ is not on the PATH. Install", tmp_path / "cache")
    assert main(["kernels", "build", "cpu"]) == 2
    assert re.fullmatch(r"minillm: error: the cpu kernels cannot be built: there is no C.*\n", capsys.readouterr().err)
    monkeypatch.setenv("CXX", "g++ 'x")
    fails("cpu", r"CXX=g\+\+ 'x cannot be split: No closing quotation", tmp_path / "cache")


def test_no_usable_nvcc(sources, fake_compiler, tmp_path, monkeypatch):
    fake_compiler()
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None if name.endswith("nvcc") else name)
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    looked = "nvcc, /opt/cuda/bin/nvcc, /usr/local/cuda/bin/nvcc"
    fails(
        "cuda", rf"there is no nvcc: {looked} \(looked on .*\). Install NVIDIA's CUDA toolkit 12.0", tmp_path / "cache"
    )
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    fails("cuda", r"there is no nvcc: /nowhere/nvcc \(NVCC names no program\)", tmp_path / "cache")


@pytest.mark.parametrize(
    ("printed", "match"),
    [("Cuda compilation tools, release 11.8, V11.8.89", r"nvcc 11.8 is too old: 12.0 or newer is needed. Set NVCC or"),
     ("hello", r"nvcc --version tells no release, but 'hello'. Set NVCC")],
)  # fmt: skip
def test_an_nvcc_that_will_not_do(sources, fake_compiler, tmp_path, monkeypatch, printed, match):
    fake_compiler()
    monkeypatch.setenv("NVCC", str(script(tmp_path / "nvcc", f"#!/bin/sh\necho '{printed}'\n")))
    fails("cuda", match, tmp_path / "cache")


def test_a_failing_compiler_shows_its_last_lines_and_keeps_all(sources, fake_compiler, tmp_path):
    fake_compiler("for i in $(seq 30); do echo line $i; done; case $made in *kernel*) exit 7;; esac")
    (sources / "cpu" / "kernel.cpp").write_text("//" + 1000 * "x")
    name = build_plan.make_plan("cpu").name
    match = r"fake-CXX failed on cpu/kernel.cpp with exit code 7. It said \(the last 20 lines of 30\):\n  line 11\n"
    text = fails("cpu", match, tmp_path / "cache", (f"{name}.log",))
    assert "line 10\n" not in text and f"  line 30\nThe whole log: {tmp_path}/cache/{name}.log" in text
    log = (tmp_path / "cache" / f"{name}.log").read_text()
    assert "line 1\n" in log and "[7] " in log and "$ " in log
    fake_compiler()
    assert build("cpu", say=quiet).is_file()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [name]  # the log of the failure is gone


def test_the_first_failure_ends_the_other_compilers(sources, fake_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    waiting = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    failing = f"while ! test -s {tmp_path}/pid; do sleep 0.01; done; exit 1"
    fake_compiler(f"case $made in *binding*) {waiting};; *) {failing};; esac")
    with pytest.raises(BuildError, match=r"kernel\.cpp with exit code 1. It said:\n  .it printed n"):
        build("cpu", say=quiet)
    gone(int((tmp_path / "pid").read_text()))


def gone(process: int) -> None:
    """Wait until a process has ended; one that is dead and not yet collected by its parent counts."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {process} still runs")


@needs_gxx
def test_a_missing_header_is_named(sources, tmp_path):
    (sources / "common.h").unlink()
    name = build_plan.make_plan("cpu").name
    fails(
        "cpu",
        r"failed on binding.cpp .*\n(.*\n)*.*common.h: No such file or directory",
        tmp_path / "cache",
        (f"{name}.log",),
    )


@needs_gxx
def test_a_missing_kernel_is_seen_when_linking(sources, tmp_path):
    (sources / "cpu" / "kernel.cpp").write_text("int colonel(int x) { return x; }\n")
    name = build_plan.make_plan("cpu").name
    fails(
        "cpu",
        r"failed on lib.so .*\n(.*\n)*.*undefined reference to `kernel\(int\)'",
        tmp_path / "cache",
        (f"{name}.log",),
    )


def test_missing_sources_and_torch_headers(sources, fake_compiler, tmp_path, monkeypatch):
    fake_compiler()
    torch = tmp_path / "torch"
    monkeypatch.setattr(build_plan, "TORCH", torch)
    fails(
        "cpu", rf"torch \S+ is without its C\+\+ headers: {torch}/include\S+/library.h is missing", tmp_path / "cache"
    )
    shutil.rmtree(sources / "cuda")
    (sources / "binding.cpp").unlink()
    fails("cuda", r"csrc lacks the sources binding.cpp, cuda/. Install minillm again", tmp_path / "cache")
    fails("emulated", r"csrc lacks the sources cuda/", tmp_path / "cache")
    shutil.rmtree(sources)
    assert built("cpu") is None


def test_a_linker_that_makes_nothing(sources, fake_compiler, tmp_path):
    fake_compiler("case $made in *lib.so) exit 0;; esac")
    name = build_plan.make_plan("cpu").name
    fails("cpu", "the linker reported success and made no lib.so", tmp_path / "cache", (f"{name}.log",))


def test_sources_that_change_meanwhile(sources, fake_compiler, tmp_path):
    """What came out is of neither version: nobody gets it, and the next build is of the new one."""
    name = build_plan.make_plan("cpu").name
    fake_compiler(f"echo '#define FACTOR 4' > {sources}/common.h")
    fails("cpu", "csrc changed while they were compiled. Build again", tmp_path / "cache", (f"{name}.log",))
    assert build("cpu", say=quiet).parent.name != name


def test_a_full_disk(sources, fake_compiler, tmp_path):
    """Of a compiler, and then of our own writing: what is written to /dev/full finds no room."""
    name = build_plan.make_plan("cpu").name
    fake_compiler("echo 'as: No space left on device'; exit 1")
    match = r"the disk is full\. Free some room, or set MINILLM_CACHE, and TMPDIR, to folders"
    fails("cpu", match, tmp_path / "cache", (f"{name}.log",))
    fake_compiler('case $made in *lib.so) ln -s /dev/full "$(dirname "$made")/build.json";; esac')
    match = f"{tmp_path}/cache cannot be written: No space left on device. Set MINILLM_CACHE"
    fails("cpu", match, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(sources, fake_compiler, tmp_path, monkeypatch):
    fake_compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        BuildError, match=r"file/cache cannot be written: Not a directory. Set MINILLM_CACHE to a folder"
    ):
        build("cpu", say=quiet)
    monkeypatch.delenv("MINILLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(
        BuildError, match=r"no place to keep what is built: relative is not a full path. Set MINILLM_CACHE"
    ):
        build("cpu", say=quiet)
    assert built("cpu") is None


def test_a_cache_of_others_can_be_read_but_not_filled(sources, fake_compiler, monkeypatch):
    folder = Path(tempfile.mkdtemp())  # not in pytest's, which only its owner may enter
    monkeypatch.setenv("MINILLM_CACHE", str(folder / "cache"))
    monkeypatch.setenv("CXX", str(shutil.copy(fake_compiler(), folder)))
    monkeypatch.setattr(build_plan, "SOURCES", shutil.copytree(sources, folder / "csrc"))
    try:
        library = build("cpu", say=quiet)
        folder.chmod(0o755)
        (folder / "cache").chmod(0o555)
        with nobody():
            assert build("cpu", say=quiet) == library
            with pytest.raises(
                BuildError, match=f"{folder}/cache cannot be written: Permission denied. Set MINILLM_CACHE"
            ):
                build("emulated", say=quiet)
        assert [p.name for p in (folder / "cache").iterdir()] == [library.parent.name]
    finally:
        (folder / "cache").chmod(0o755)
        shutil.rmtree(folder)


class nobody:
    """Permissions bind inside, also where the tests run as root."""

    def __enter__(self):
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *_error):
        if self.root:
            os.seteuid(0)


PROCESS = """
import pathlib, sys
from minillm.ops import build_plan, build
build_plan.SOURCES = pathlib.Path(sys.argv[1])
try:
    print(build.build("cpu"))
except KeyboardInterrupt:
    print("interrupted")
"""


def start(sources: Path) -> subprocess.Popen:
    """Another process that builds the cpu kernels, and that Ctrl-C ends: a shell's background jobs ignore it."""
    command = [sys.executable, "-c", PROCESS, str(sources)]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)


def wait_for(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


def lines_when(process: subprocess.Popen, word: str) -> str:
    """The process's next lines on stderr, up to one with this word."""
    lines = ""
    while word not in lines:
        line = process.stderr.readline()
        assert line, f"it ended without saying {word!r}: {lines}"
        lines += line
    return lines


@pytest.fixture
def slow(fake_compiler, tmp_path):
    """Compilers that count themselves, and wait until the file `go` is there."""
    fake_compiler(f"echo $$ >> {tmp_path}/started; while ! test -e {tmp_path}/go; do sleep 0.02; done")
    return tmp_path / "started"


def test_two_processes_at_once_build_once(sources, slow, tmp_path):
    first = start(sources)
    lines_when(first, "building")
    second = start(sources)
    assert "another process is building the cpu kernels: waiting for it" in lines_when(second, "waiting")
    (tmp_path / "go").touch()
    (one, _), (two, said) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert one == two and Path(one.strip()).is_file() and "building" not in said
    assert len(slow.read_text().split()) == 3  # two files and the link, once
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [Path(one).parent.name]


def test_who_waits_takes_over_from_a_killed_build(sources, slow, tmp_path):
    """Nothing half-built is visible meanwhile, and what the killed one left is removed."""
    first = start(sources)
    lines_when(first, "building")
    wait_for(slow.exists)
    second = start(sources)
    lines_when(second, "waiting")
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines_when(second, "building")
    assert built("cpu") is None
    (tmp_path / "go").touch()
    library = Path(second.communicate(timeout=60)[0].strip())
    assert built("cpu") == library and library.is_file()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [library.parent.name]
    first.communicate()


def test_a_killed_build_blocks_nothing(sources, slow, tmp_path):
    first = start(sources)
    wait_for(lambda: slow.exists() and slow.read_text().endswith("\n"))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    left = [p.name for p in (tmp_path / "cache").iterdir()]
    assert any(name.endswith(".lock") for name in left) and any(name.startswith(".cpu-") for name in left)
    assert built("cpu") is None
    (tmp_path / "go").touch()
    library = build("cpu", say=lambda message: None if "waiting" not in message else pytest.fail(message))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [library.parent.name]


def test_ctrl_c_ends_the_compilers_and_leaves_nothing(sources, slow, tmp_path):
    first = start(sources)
    lines_when(first, "building")
    wait_for(lambda: slow.exists() and slow.read_text().endswith("\n"))
    first.send_signal(signal.SIGINT)
    assert first.communicate(timeout=60)[0] == "interrupted\n"
    for process in slow.read_text().split():
        gone(int(process))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_lock_file_that_somebody_left_is_no_lock(sources, fake_compiler, tmp_path):
    fake_compiler()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{build_plan.make_plan('cpu').name}.lock").touch()
    said = []
    build("cpu", say=said.append)
    assert not [message for message in said if "waiting" in message]


def test_other_systems_are_told_so(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    fails("cpu", "this is darwin, and they are for Linux. The torch implementations run everywhere", tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("gpu", {}), "there are no 'gpu' kernels: choose one of cpu, cuda, emulated"),
        (("cuda", {"sanitize": True}), "NVIDIA's compute-sanitizer checks cuda kernels"),
        (("cpu", {"only": ("kernel.cpp",)}), "the cpu kernels are built all together; only emulated ones apart"),
        (("emulated", {"only": ("three.cu", "one.cu")}), "there is no three.cu; choose of one.cu, two.cu"),
    ],
)
def test_arguments_that_do_not_fit(sources, arguments, match):
    kind, options = arguments
    for function in (build, built):
        with pytest.raises(ValueError, match=match):
            function(kind, **options)


def test_architectures_that_nvcc_would_not_know(sources, monkeypatch):
    monkeypatch.setenv("MINILLM_CUDA_ARCHS", "9.0, sm_80")
    with pytest.raises(
        ValueError, match=r"MINILLM_CUDA_ARCHS=9.0, sm_80: 9.0 should be like sm_90a, or compute_90 for PTX"
    ):
        built("cuda")
