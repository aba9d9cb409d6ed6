"""What binding.cpp gives the CUDA kernels of low-rank updates, from the Python that calls it down: on the emulated GPU.

The binding is compiled with -DMINILLM_EMULATED, so tensors on the processor go the way of a GPU's, and the launchers
that it calls are those of the emulated library. torch knows one library of a name, so it has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.ops.build import build, obstacle

RUN = """
import ctypes, json, sys, traceback, torch
from lora_cases import CASES, MIXED, TYPES, check_linear, check_mixed
from minillm.ops import native
from minillm.ops.emulate import Counts

binding, emulated, check = sys.argv[1:]
machine = ctypes.CDLL(emulated, ctypes.RTLD_GLOBAL)
native._load(binding, native._modules())
native._found = True
failures = []
torch.set_num_threads(1)
for label, case in (CASES if check != "mixed" else MIXED).items():
    for kind, types in TYPES.items():
        torch.manual_seed(0)
        try:
            if check == "mixed":
                check_mixed(case, types)
            else:
                check_linear(case, types, float(check))
        except Exception:
            failures.append(f"{label}, {kind}: {traceback.format_exc(limit=-3)}")
machine.emulator_counts.restype = ctypes.POINTER(Counts)
assert machine.emulator_counts().contents.blocks > 100, "it was not the emulated GPU that ran"
print(json.dumps(failures))
"""
REFUSED = """
import ctypes, sys, torch
from minillm.ops import native

binding, emulated = sys.argv[1:]
ctypes.CDLL(emulated, ctypes.RTLD_GLOBAL)
native._load(binding, native._modules())
x, a = torch.randn(6, 12), torch.randn(3, 12)
y, b = torch.randn(6, 7), torch.randn(7, 3)
for stage in (2, 4, 5):
    try:
        torch.ops.minillm.lora(y, x, a, b, 1.0, 0.0, None, stage)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
expected = y + (x @ a.T) @ b.T
for stage in (0, 1, 3):
    torch.testing.assert_close(torch.ops.minillm.lora(y, x, a, b, 1.0, 0.0, None, stage)[0], expected)
"""


@pytest.fixture(scope="module")
def libraries() -> tuple[str, str]:
    if reason := obstacle("cpu"):
        pytest.skip(f"no compiler: {reason}")
    return str(build("cpu", defines=("MINILLM_CUDA", "MINILLM_EMULATED"))), str(build("emulated"))


def run(script: str, *arguments: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "MINILLM_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("check", ["0.0", "0.05", "mixed"])
def test_outputs_and_all_gradients(libraries, check):
    """The dropout of one adapter's update, or a batch of many adapters."""
    assert json.loads(run(RUN, *libraries, check)) == []


def test_a_stage_that_cannot_take_a_call_says_so(libraries):
    """Stage 2 wants the ranks of B apart, stage 4 bfloat16; there is no stage 5."""
    said = run(REFUSED, *libraries).splitlines()
    assert [line.partition("minillm kernels: ")[2] for line in said] == [
        f"lora: stage {stage} does not take these shapes or types" for stage in (2, 4, 5)
    ]
