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
HOT += ["lora_gather_v2", "lora_gather_v4", "lora_gather_sum_v2"]
ON_TENSOR_CORES = {  # and in how many kernels
    **{"attention_v3": 4, "attention_v4": 4, "attention_backward_v2": 6},
    **{"lora_gather_v4": 4, "lora_gather_sum_v2": 1},
}
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


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", [*ON_TENSOR_CORES, "attention_v2"])
def test_the_tensor_cores_multiply(folder, kernel, arch):
    program = cuobjdump()
    if not program:
        pytest.skip("there is no cuobjdump: it comes with NVIDIA's toolkit, and with `pip install triton`")
    cubin, _ = compiled(folder, kernel, arch)
    code = subprocess.run([program, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", code)[1:]
    multiply = [function for function in functions if "HMMA.16816.F32.BF16" in function]
    assert len(multiply) == ON_TENSOR_CORES.get(kernel, 0)
    if kernel in ("attention_v4", "attention_backward_v2"):
        assert all("LDSM" in function and "LDGSTS" in function for function in multiply)  # ldmatrix, cp.async
