"""What nvcc makes of the kernels that the emulated GPU runs: no GPU is needed to read it.

Which kernels are held to what is read from the sources: a new .cu file is tested with no change here.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minillm.ops.build_plan import ARCHS, CUDA, SOURCES
from minillm.ops.compilers import BuildError, find_nvcc

MACHINES = [name for name in ARCHS.split(",") if name.startswith("sm_")]
MAX_REGISTERS = 255  # of a thread; what does not fit is spilled to memory
NAIVE = {"attention_v1"}  # its output lies in memory between the keys: the first stage says so
WORDS = ("device.cuh", "hopper.cuh", "wgmma.cuh")  # they define the words that kernels use
ON_TENSOR_CORES = {  # in how many instantiations
    **{"attention_v3": 4, "attention_v4": 4, "attention_backward_v2": 6},
    **{"lora_gather_v4": 4, "lora_gather_sum_v2": 1},
}
HOPPER = "sm_90a"


@functools.cache
def text_of(name: str) -> str:
    """A source, and the headers of kernels that it includes, but not those that define the words."""
    text = (SOURCES / "cuda" / name).read_text()
    headers = [header for header in re.findall(r'#include "(\w+\.cuh)"', text) if header not in WORDS]
    return re.sub(r"//.*", "", text) + "".join(map(text_of, headers))


def kernels(word: str = "__global__") -> list[str]:
    """The .cu files with a kernel, and this word in them or in what they include."""
    names = sorted(path.stem for path in (SOURCES / "cuda").glob("*.cu"))
    text = {name: text_of(f"{name}.cu") for name in names}
    return [name for name in names if "__global__" in text[name] and re.search(rf"\b{word}", text[name])]


@functools.cache
def compiled(folder: Path, kernel: str, arch: str) -> tuple[Path, str]:
    """The machine code of a .cu file, and what the assembler says of it."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    cubin = folder / f"{kernel}.{arch}.cubin"
    command = [*nvcc.command, *CUDA, f"-arch={arch}", "-cubin", f"cuda/{kernel}.cu", "-o", str(cubin)]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.slow
@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("kernel", kernels())
def test_no_register_is_spilled(folder, kernel, arch):
    _, said = compiled(folder, kernel, arch)
    assert "warning" not in said.replace("ptxas info", ""), said
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    in_memory = [int(number) for number in re.findall(r"(\d+) bytes stack frame", said)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert spilled and registers, said
    assert set(spilled) == {0} and max(registers) <= MAX_REGISTERS
    assert kernel in NAIVE or set(in_memory) == {0}  # an array with an index that is not known when it is compiled
    print(f"{kernel} {arch}: {min(registers)} to {max(registers)} registers in {len(registers)} kernels")


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    in_triton = [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton and triton.origin else []
    return next((str(path) for path in in_triton if path.exists()), shutil.which("cuobjdump"))


def dumped(folder: Path, kernel: str, arch: str, what: str) -> str:
    """What cuobjdump tells of a .cu file's machine code."""
    program = cuobjdump()
    if not program:
        pytest.skip("there is no cuobjdump: it comes with NVIDIA's toolkit, and with `pip install triton`")
    cubin, _ = compiled(folder, kernel, arch)
    return subprocess.run([program, what, str(cubin)], capture_output=True, text=True, check=True).stdout


def instructions(folder: Path, kernel: str, arch: str) -> list[str]:
    """Those of each instantiation of a kernel, with its name before them."""
    return re.split(r"\n\s*Function : ", dumped(folder, kernel, arch, "--dump-sass"))[1:]


@pytest.mark.slow
@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("kernel", [*kernels(r"mma\("), "attention_v2"])
def test_the_tensor_cores_multiply(folder, kernel, arch):
    functions = instructions(folder, kernel, arch)
    multiply = [function for function in functions if "HMMA.16816.F32.BF16" in function]
    print(f"{kernel} {arch}: {len(multiply)} of {len(functions)} multiply")
    assert bool(multiply) == (kernel in kernels(r"mma\("))
    assert len(multiply) == ON_TENSOR_CORES.get(kernel, len(multiply))
    for words, instruction in ((r"load_tiles", "LDSM"), (r"copy_async\(", "LDGSTS")):  # ldmatrix, cp.async
        assert all(instruction in function for function in multiply) or kernel not in kernels(words)


@pytest.mark.slow
def test_hopper_multiplies_and_copies_by_its_own_instructions(folder):
    """K features, tiles of `keys`: K / 16 products make the scores of 64 queries, keys / 16 the output; K / 64 copies
    fill a tile. One product more than that would be one that the compiler took apart."""
    functions = {int(re.search(r"ILi(\d+)E", code)[1]): code for code in instructions(folder, "attention_v5", HOPPER)}
    assert set(functions) == {64, 128, 256}
    for K, code in functions.items():
        keys = 64 if K > 128 else 128
        shapes = [int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16", code)]
        assert sorted(shapes) == sorted([keys] * (K // 16) + [K] * (keys // 16))
        assert len(re.findall(r"UTMALDG\.4D", code)) == 3 * K // 64  # queries, keys, values
        assert len(re.findall(r"USETMAXREG", code)) == 2 and "SYNCS.PHASECHK" in code
        assert "HMMA." not in code and "LDSM" not in code


@pytest.mark.slow
@pytest.mark.parametrize("arch, threads", [("sm_80", 32), ("sm_90", 32), (HOPPER, 384)])
def test_the_largest_block_tells_the_kernel_for_hopper_from_the_stub(folder, arch, threads):
    """The launcher asks for it: a stub that ran would leave the output as it was."""
    _, said = compiled(folder, "attention_v5", arch)
    assert "warning" not in said.replace("ptxas info", ""), said
    told = dumped(folder, "attention_v5", arch, "--dump-elf")
    assert re.findall(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+(\w+)", told) == [hex(threads)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_few_rows_ask_for_all_outputs_before_they_wait_for_one(folder, M):
    """The idea of linear.cu's stage 2: 16 bytes of 4 outputs' weights, and of each row of x, are under way at once."""
    name = f"linear_v2I13__nv_bfloat16Li{M}ELi8E"
    (kernel,) = (code for code in instructions(folder, "linear", HOPPER) if name in code)
    steps = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", kernel)
    loads = [place for place, step in enumerate(steps) if step == "LDG.E.128"]
    assert len(loads) == 4 + M and "FFMA" not in steps[loads[0] : loads[-1]]
