"""The kernels' arguments as Python lays them out: byte by byte as g++ does."""

import ctypes
import subprocess

import pytest

from minillm.ops.build_plan import SOURCES
from minillm.ops.compilers import BuildError, find_cxx
from minillm.ops.structures import structures

HEADERS = sorted(path.name for path in SOURCES.glob("*.h"))


def places(name: str, structure: type[ctypes.Structure]) -> list[str]:
    """The size of a struct, then where each field begins."""
    fields = [f"{name}.{field} {getattr(structure, field).offset}" for field, _ in structure._fields_]
    return [f"{name} {ctypes.sizeof(structure)}", *fields]


def test_python_lays_out_the_arguments_as_the_compiler_does(tmp_path):
    try:
        cxx = find_cxx()
    except BuildError as error:
        pytest.skip(str(error))
    found = {name: structure for header in HEADERS for name, structure in structures(header).items()}
    assert {"Attention", "LoraLinearGrad", "Nf4Linear", "Rope"} <= set(found)
    lines = [f'#include "{header}"' for header in HEADERS]
    lines += ["#include <cstddef>", "#include <cstdio>", "int main() {"]
    for name, structure in found.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in structure._fields_:
            lines.append(f'std::printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    (tmp_path / "places.cpp").write_text("\n".join([*lines, "}"]))
    command = [*cxx.command, "-std=c++20", "-I.", str(tmp_path / "places.cpp"), "-o", str(tmp_path / "places")]
    subprocess.run(command, cwd=SOURCES, check=True)
    printed = subprocess.run([tmp_path / "places"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [place for name, structure in found.items() for place in places(name, structure)]


def test_every_struct_of_a_header_is_read():
    for header in HEADERS:
        assert (SOURCES / header).read_text().count("\nstruct ") == sum(
            f"\nstruct {name} " in (SOURCES / header).read_text() for name in structures(header)
        )
