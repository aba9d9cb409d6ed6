"""What nvcc makes of the kernels that the emulated GPU runs: no GPU is needed to read it."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minillm.ops.build_plan import CUDA, SOURCES
from minillm.ops.compilers import BuildError, find_nvcc

HOT = [f"attention_{name}" for name in ("v2", "v3", "v4", "backward_v1", "backward_v2", "decode")]
HOT += ["linear", "nf4_quantize", "nf4_dequantize", "nf4_linear"]
ON_TENSOR_CORES = {"attention_v3": 4, "attention_v4": 4, "attention_backward_v2": 6}  # and in how many kernels
MAX_REGISTERS = 255  # of a thread; what does not fit is spilled to memory


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
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", HOT)
def test_no_register_is_spilled(folder, kernel, arch):
    _, said = compiled(folder, kernel, arch)
    assert "warning" not in said.replace("ptxas info", ""), said
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert spilled and registers, said
    assert set(spilled) == {0} and max(registers) <= MAX_REGISTERS
    print(f"{kernel} {arch}: {min(registers)} to {max(registers)} registers in {len(registers)} kernels")


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    in_triton = [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton and triton.origin else []
    return next((str(path) for path in in_triton if path.exists()), shutil.which("cuobjdump"))


def machine_code(folder: Path, kernel: str, arch: str) -> list[str]:
    """Of each kernel in a .cu file, as text that begins with its name."""
    program = cuobjdump()
    if not program:
        pytest.skip("there is no cuobjdump: it comes with NVIDIA's toolkit, and with `pip install triton`")
    cubin, _ = compiled(folder, kernel, arch)
    code = subprocess.run([program, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return re.split(r"\n\s*Function : ", code)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", [*ON_TENSOR_CORES, "attention_v2"])
def test_the_tensor_cores_multiply(folder, kernel, arch):
    functions = machine_code(folder, kernel, arch)
    multiply = [function for function in functions if "HMMA.16816.F32.BF16" in function]
    assert len(multiply) == ON_TENSOR_CORES.get(kernel, 0)
    if kernel in ("attention_v4", "attention_backward_v2"):
        assert all("LDSM" in function and "LDGSTS" in function for function in multiply)  # ldmatrix, cp.async


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_few_rows_ask_for_all_outputs_before_they_wait_for_one(folder, M):
    """The idea of linear.cu's stage 2: 16 bytes of 4 outputs' weights, and of each row of x, are under way at once."""
    name = f"linear_v2I13__nv_bfloat16Li{M}ELi8E"
    (kernel,) = (code for code in machine_code(folder, "linear", "sm_90") if name in code)
    instructions = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", kernel)
    loads = [place for place, name in enumerate(instructions) if name == "LDG.E.128"]
    assert len(loads) == 4 + M and "FFMA" not in instructions[loads[0] : loads[-1]]
