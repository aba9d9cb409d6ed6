"""The arguments of the kernels as ctypes has them, read from the headers in csrc/ that declare them."""

import ctypes
import functools
import re

from minillm.ops.build_plan import SOURCES

NUMBERS = {
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
}


@functools.cache
def structures(header: str) -> dict[str, type[ctypes.Structure]]:
    """name -> the struct of this name in csrc/`header`, or in a header that it includes."""
    text = (SOURCES / header).read_text()
    found = {}
    for included in re.findall(r'#include "(\w+\.h)"', text):
        found |= structures(included)
    for name, body in re.findall(r"struct (\w+) {(.*?)\n};", re.sub(r"//.*", "", text), re.DOTALL):
        fields = [field for line in body.split(";") if line.strip() for field in _fields(line, found)]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def _fields(declaration: str, known: dict[str, type]) -> list[tuple[str, type]]:
    """`const float *cos, *sin` -> [("cos", pointer), ("sin", pointer)]; `uint32_t seed[2]` -> [("seed", 2 numbers)]."""
    kind, names = re.fullmatch(r"\s*(?:const )?(\w+)(.*)", declaration, re.DOTALL).groups()
    fields = []
    for name in names.split(","):
        star, name, count = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", name).groups()
        type_ = ctypes.c_void_p if star else NUMBERS.get(kind) or known[kind]
        fields.append((name, type_ * int(count) if count else type_))
    return fields
