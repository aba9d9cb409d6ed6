"""A sample of the tests; and a tiny tree of kernel sources, and compilers that are shell scripts, for the build's."""

import os
from pathlib import Path

import pytest

from minillm.ops import build_plan

SOURCES = {
    "common.h": "#pragma once\n#define FACTOR 3\n",
    "binding.cpp": '#include "common.h"\nint kernel(int);\nextern "C" int run(int x) { return FACTOR * kernel(x); }\n',
    "cpu/kernel.cpp": "int kernel(int x) { return x + 1; }\n",
    "cuda/one.cu": '#include "cuda_runtime.h"\nextern "C" int one() { return ONE; }\n',
    "cuda/two.cu": '#include "cuda_runtime.h"\n#ifndef MUTANT\n#define MUTANT 0\n#endif\n'
    'extern "C" int two(int* x, int i) { return x[i] + 2 * ONE + MUTANT; }\n',
    "emulator/cuda_runtime.h": "#define ONE 1\n",
}
# What a compiler is asked first is its version; then `-o FILE` is what it makes.
FAKE = """#!/bin/sh
case "$*" in *-dM*) echo '#define __GNUC__ {version} '; exit;; *--version*) echo 'release {version}.0'; exit;; esac
arguments="$*"
while [ "$1" != -o ]; do shift; done
made=$2
{body}
echo "$arguments" > "$made"
"""


def pytest_collection_modifyitems(config, items):
    """MINILLM_TEST_SAMPLE=1 leaves of each test with parameters as few calls as take each value of each of them."""
    if os.environ.get("MINILLM_TEST_SAMPLE") != "1":
        return
    seen, left, dropped = set(), [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {"": ""}
        values = {(item.path, item.originalname, name, repr(value)) for name, value in parameters.items()}
        (dropped if values <= seen else left).append(item)
        seen |= values
    items[:] = left
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """The tree, in the place of minillm's; the cache is tmp_path/cache, and the environment names no compiler."""
    for name, text in SOURCES.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for variable in ("CXX", "NVCC", "CUDA_HOME", "MINILLM_CXXFLAGS", "MINILLM_CUDA_ARCHS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_plan, "SOURCES", tmp_path / "csrc")
    return tmp_path / "csrc"


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """`fake_compiler(body, variable, version)`: a script in the place of CXX or NVCC, which runs body; its path."""

    def make(body: str = "", variable: str = "CXX", version: int = 12) -> Path:
        path = tmp_path / f"fake-{variable}"
        path.write_text(FAKE.format(version=version, body=body))
        os.chmod(path, 0o755)
        monkeypatch.setenv(variable, str(path))
        return path

    return make
