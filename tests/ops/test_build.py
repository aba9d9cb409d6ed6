"""Building native kernels: what is compiled, with which flags, what is kept, and when it is compiled anew."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import minillm
from minillm import ops
from minillm.cli import main
from minillm.ops import build_cache, build_plan, compilers
from minillm.ops.build import build, built
from minillm.ops.build_plan import make_plan

ROOT = Path(minillm.__file__).parents[1]
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux")


def quiet(_message: str) -> None:
    pass


@needs_gxx
def test_cpu_kernels_are_compiled_kept_and_run(sources, tmp_path):
    """run(x) = FACTOR * (x + 1) = 3 * (4 + 1) = 15."""
    said = []
    library = build("cpu", say=said.append)
    assert ctypes.CDLL(str(library)).run(4) == 15
    assert built("cpu") == library == tmp_path / "cache" / make_plan("cpu").name / "lib.so"
    assert sorted(p.name for p in library.parent.iterdir()) == ["build.json", "build.log", "lib.so"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [library.parent.name]  # neither lock nor remains
    facts = json.loads((library.parent / "build.json").read_text())
    assert (facts["kind"], facts["units"]) == ("cpu", ["binding.cpp", "cpu/kernel.cpp"])
    assert re.fullmatch(r"g\+\+ \d+\.\d+\.\d+", facts["compilers"]["cxx"])
    log = (library.parent / "build.log").read_text()
    assert log.count("$ g++ ") == log.count("[0]") == 3
    assert sorted(line.split()[0] for line in said[1:-1]) == ["binding.cpp", "cpu/kernel.cpp", "lib.so"]
    assert said[0].startswith("building the cpu kernels with g++") and said[-1] == f"built {library}"


@needs_gxx
def test_emulated_kernels_need_no_torch_and_take_mutants(sources):
    """two(x, i) = x[i] + 2 * ONE + MUTANT."""
    numbers = (ctypes.c_int * 1)(40)
    plain, mutant = build("emulated", say=quiet), build("emulated", defines=("MUTANT=3",), say=quiet)
    assert ctypes.CDLL(str(plain)).two(numbers, 0) == 42 and ctypes.CDLL(str(plain)).one() == 1
    assert ctypes.CDLL(str(mutant)).two(numbers, 0) == 45
    assert "torch" not in (plain.parent / "build.log").read_text()
    alone = build("emulated", only=("one.cu",), say=quiet)
    assert ctypes.CDLL(str(alone)).one() == 1
    assert (alone.parent / "build.log").read_text().count(" -c ") == 1
    assert len({plain, mutant, alone}) == 3


@needs_gxx
def test_sanitizers_see_what_an_emulated_kernel_reads(sources):
    """x[3] of one int lies outside: AddressSanitizer names the file and the line."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("g++ has no AddressSanitizer here")
    library = build("emulated", sanitize=True, say=quiet)
    code = (
        f"import ctypes; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        f"ctypes.CDLL({str(library)!r}).two(ctypes.c_void_p(libc.malloc(4)), 3)"
    )
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert "heap-buffer-overflow" in done.stderr and re.search(r"cuda/two\.cu:5\b", done.stderr)


@needs_gxx
def test_tiny_numbers_stay_after_loading(sources):
    """Linking with -ffast-math would make every later program part round 1e-310 to 0."""
    library = build("cpu", say=quiet)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}); print(float('1e-300') * float('1e-10') > 0)"
    load = [sys.executable, "-c", f"import torch; {code}"]
    assert subprocess.run(load, capture_output=True, text=True).stdout == "True\n"


def test_the_same_is_not_compiled_again(sources, fake_compiler, tmp_path):
    fake_compiler(f"echo x >> {tmp_path}/count")
    library = build("cpu", say=quiet)
    assert build("cpu", say=quiet) == library
    assert (tmp_path / "count").read_text() == "x\n" * 3  # two files and the link


def test_looking_up_starts_no_program(sources, fake_compiler, monkeypatch):
    fake_compiler()
    library = build("cpu", say=quiet)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert built("cpu") == library == build("cpu")
    assert built("emulated") is None


CHANGES = {  # what changes -> the kinds that it makes anew
    "a source": {"cpu", "cuda"},
    "a header": {"cpu", "cuda", "emulated"},
    "a new header": {"cpu", "cuda", "emulated"},
    "a cuda source": {"cuda", "emulated"},
    "the emulator": {"emulated"},
    "a flag": {"cpu", "cuda"},
    "torch 2.99": {"cpu", "cuda"},
    "the processor": {"cpu", "cuda"},
    "flags of the environment": {"cpu", "cuda", "emulated"},
    "the architectures": {"cuda"},
    "torch with CUDA": {"cuda"},
    "torch 2.13.9": set(),
    "an editor's file": set(),
    "a text": set(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_makes_a_new_build(sources, what, monkeypatch, tmp_path):
    monkeypatch.setattr(build_plan.torch, "__version__", "2.13.0+cpu")
    before = {kind: make_plan(kind).name for kind in build_plan.KINDS}
    match what:
        case "a source":
            (sources / "cpu" / "kernel.cpp").write_text("int kernel(int x) { return x + 2; }\n")
        case "a header":
            (sources / "common.h").write_text("#define FACTOR 4\n")
        case "a new header":
            (sources / "more.h").write_text("")
        case "a cuda source":
            (sources / "cuda" / "one.cu").write_text("")
        case "the emulator":
            (sources / "emulator" / "cuda_runtime.h").write_text("#define ONE 2\n")
        case "a flag":
            monkeypatch.setattr(build_plan, "CPU", ("-O0",))
        case "the processor":
            monkeypatch.setattr(build_plan, "_instructions", lambda: "flags: mmx")
        case "flags of the environment":
            monkeypatch.setenv("MINILLM_CXXFLAGS", "-march=x86-64-v3")
        case "the architectures":
            monkeypatch.setenv("MINILLM_CUDA_ARCHS", "sm_90a")
        case "torch with CUDA":
            (tmp_path / "lib").mkdir()
            (tmp_path / "lib" / "libtorch_cuda.so").touch()
            monkeypatch.setattr(build_plan, "TORCH", tmp_path)
        case "an editor's file":
            (sources / "cpu" / ".kernel.cpp.swp").touch()
        case "a text":
            (sources / "cuda" / "README.md").touch()
        case version:
            monkeypatch.setattr(build_plan.torch, "__version__", version.split()[1])
    assert {kind for kind in build_plan.KINDS if make_plan(kind).name != before[kind]} == CHANGES[what]


def test_options_make_builds_of_their_own(sources):
    plans = [
        make_plan("emulated"),
        make_plan("emulated", defines=("MUTANT=1",)),
        make_plan("emulated", defines=("MUTANT=2",)),
        make_plan("emulated", sanitize=True),
        make_plan("emulated", only=("one.cu",)),
        make_plan("cpu", sanitize=True),
        make_plan("cpu"),
    ]
    assert len({plan.name for plan in plans}) == len(plans)
    one = make_plan("emulated", only=("one.cu",)).name
    (sources / "cuda" / "two.cu").write_text("// changed\n")
    assert make_plan("emulated", only=("one.cu",)).name == one  # not part of it


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_compilers_run_than_there_are_processors(sources, fake_compiler, tmp_path, monkeypatch, limit):
    for i in range(4):
        (sources / "cpu" / f"more{i}.cpp").touch()
    (tmp_path / "now").mkdir()
    fake_compiler(
        f"touch {tmp_path}/now/$$; ls {tmp_path}/now | wc -l >> {tmp_path}/counts; sleep 0.3; rm {tmp_path}/now/$$"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(limit)))
    build("cpu", say=quiet)
    counts = (tmp_path / "counts").read_text().split()
    assert (len(counts), max(map(int, counts))) == (7, limit)


def test_cuda_kernels_go_through_nvcc(sources, fake_compiler, tmp_path, monkeypatch):
    cxx, nvcc = fake_compiler(), fake_compiler(variable="NVCC")
    monkeypatch.setenv("MINILLM_CUDA_ARCHS", "sm_90a compute_90")
    log = (build("cuda", say=quiet).parent / "build.log").read_text()
    commands = [line[2:] for line in log.splitlines() if line.startswith("$ ")]
    by_nvcc = [command for command in commands if command.startswith(f"{nvcc} -ccbin {cxx} ")]
    assert len(commands) == 5 and len(by_nvcc) == 3  # two .cu files and the link
    assert all(
        "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90 " in command
        for command in by_nvcc
        if ".cu.o" in command and " -c " in command
    )
    assert [" -DMINILLM_CUDA " in command for command in commands if "-c binding.cpp" in command] == [True]


def test_flags_of_the_environment_come_last_and_only_to_the_cpp_compiler(sources, fake_compiler, monkeypatch):
    fake_compiler(), fake_compiler(variable="NVCC", version=13)
    monkeypatch.setenv("MINILLM_CXXFLAGS", "-march=x86-64-v3 '-DNAME=two words'")
    plans = [make_plan(kind).flags for kind in ("cpu", "cuda", "emulated")]
    given = ("-march=x86-64-v3", "-DNAME=two words")
    by_cxx = [plans[0]["cpu"], plans[0][""], plans[1]["cpu"], plans[2]["cuda"]]
    assert all(flags[-2:] == given for flags in by_cxx) and set(given) < set(plans[0]["link"])
    assert not set(given) & {*plans[1]["cuda"], *plans[1]["link"]}
    monkeypatch.setenv("MINILLM_CXXFLAGS", "-DNAME='two")
    with pytest.raises(compilers.BuildError, match="MINILLM_CXXFLAGS=-DNAME='two cannot be split: No closing"):
        build("cpu", say=quiet)


def test_a_torch_with_cuda_is_linked_though_only_a_weak_symbol_asks_for_it(sources, tmp_path, monkeypatch):
    assert "-ltorch_cuda" not in make_plan("cpu").flags["link"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(build_plan, "TORCH", tmp_path)
    flags = make_plan("cuda").flags["link"]
    assert flags.index("-Xlinker=--no-as-needed") < flags.index("-ltorch_cuda")


@pytest.mark.slow
def test_nvcc_compiles_what_loads_without_a_gpu(sources, monkeypatch):
    try:
        compilers.find_nvcc()
    except compilers.BuildError as error:
        pytest.skip(str(error))
    (sources / "cuda" / "one.cu").write_text(
        '__global__ void k(int* x) { *x = 1; }\nextern "C" int one() { return 1; }\n'
    )
    (sources / "cuda" / "two.cu").unlink()
    monkeypatch.setenv("MINILLM_CUDA_ARCHS", "sm_90a")
    library = build("cuda", say=quiet)
    assert (ctypes.CDLL(str(library)).run(4), ctypes.CDLL(str(library)).one()) == (15, 1)
    assert "0 bytes spill stores" in (library.parent / "build.log").read_text()


def test_where_nvcc_is_looked_for(sources, fake_compiler, tmp_path, monkeypatch):
    named = fake_compiler(variable="NVCC", version=13)
    for place in ("path", "home/bin"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(named, tmp_path / place / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert compilers.find_nvcc() == ((str(named),), "13.0")
    monkeypatch.delenv("NVCC")
    assert compilers.find_nvcc().command == (str(tmp_path / "path" / "nvcc"),)
    monkeypatch.setenv("PATH", "")
    assert compilers.find_nvcc().command == (str(tmp_path / "home" / "bin" / "nvcc"),)


def test_cxx_may_be_several_words(sources, fake_compiler, monkeypatch):
    path = fake_compiler()
    monkeypatch.setenv("CXX", f"env A=1 {path}")
    assert compilers.find_cxx() == (("env", "A=1", str(path)), "12.0.0")


def test_where_builds_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MINILLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build_cache.cache_folder() == Path("/home/someone/.cache/minillm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert build_cache.cache_folder() == Path("/var/cache/minillm")
    monkeypatch.setenv("MINILLM_CACHE", "here")
    monkeypatch.chdir(tmp_path)
    assert build_cache.cache_folder() == tmp_path / "here"  # in full: compilers run in another folder


def test_clean_removes_ours_alone(sources, fake_compiler, tmp_path, capsys):
    fake_compiler()
    library = build("cpu", say=quiet)
    expected = sum(file.stat().st_size for file in library.parent.iterdir())
    cache, name = tmp_path / "cache", "cuda-0123456789abcdef"
    for foreign in ("cpu-notes/a.txt", "mine.log", "cpu-0123456789abcdef-copy/lib.so"):
        (cache / foreign).parent.mkdir(exist_ok=True)
        (cache / foreign).write_text("keep")
    (cache / f".{name}.x7_").mkdir()
    (cache / f".{name}.x7_" / "a.o").write_bytes(bytes(1000))
    (cache / f"{name}.log").write_bytes(bytes(100))
    assert main(["kernels", "clean"]) == 0
    assert capsys.readouterr().out == f"{expected + 1100:,} bytes removed from {cache}\n"
    assert sorted(p.name for p in cache.iterdir()) == ["cpu-0123456789abcdef-copy", "cpu-notes", "mine.log"]


def test_clean_leaves_what_is_being_built(sources, fake_compiler, tmp_path):
    fake_compiler()
    library = build("cpu", say=quiet)
    with build_cache.locked(tmp_path / "cache" / f"{library.parent.name}.lock", lambda: None):
        assert build_cache.clean() == (0, [library.parent.name])
        assert library.is_file()
    assert build_cache.clean()[1] == [] and not (tmp_path / "cache").exists()


def test_one_holder_of_a_lock_at_a_time(tmp_path):
    """Each holder removes the file, and those who waited for it must not hold a file that is no longer there."""
    inside, most = [], []

    def hold():
        for _ in range(25):
            with build_cache.locked(tmp_path / "lock", lambda: None):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.0005)
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (200, 1)
    assert not list(tmp_path.iterdir())


def test_the_commands_say_what_there_is(sources, fake_compiler, monkeypatch, capsys):
    path = fake_compiler()
    assert main(["kernels", "build", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"cpu: built in \d+\.\d s with {path} 12\.0\.0\n", out)
    assert "minillm: building the cpu kernels" in err
    assert main(["kernels", "build", "cpu"]) == 0
    assert "cpu: built 20" in capsys.readouterr().out
    build("emulated", defines=("MUTANT=1",), say=quiet)
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    monkeypatch.setattr(ops, "info", lambda: {"attention": {"runs": "torch", "native": "not built"}})
    assert main(["kernels", "info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in lines if line}
    assert table["cpu"].endswith("lib.so") and "there is no nvcc: /nowhere/nvcc" in table["cuda"]
    assert table["emulated"].endswith("only of other sources or flags: minillm kernels build emulated")
    assert "other builds" in lines[-1] and ": 1, " in lines[-1]
    assert table["attention"].split("  ") == ["attention", "torch", "native: not built"]


def test_sources_are_in_the_wheel():
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    packed = {file.distribution_path for file in builder.recurse_included_files()}
    here = [p for p in (ROOT / "minillm" / "ops" / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert here and not {p.relative_to(ROOT).as_posix() for p in here} - packed


def test_importing_builds_nothing(sources, fake_compiler, tmp_path):
    """Nor does it need fcntl, which Windows lacks."""
    fake_compiler(f"touch {tmp_path}/ran")
    code = "import sys; sys.modules['fcntl'] = None; import minillm.ops, minillm.ops.build, minillm.recipes.kernels"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()
