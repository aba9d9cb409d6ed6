"""`minillm kernels`: build the native kernels, say which run and why others do not, and remove what was built."""

from pathlib import Path
from typing import Any

import torch

from minillm import ops
from minillm.files import read_json
from minillm.ops.build import build, built, obstacle
from minillm.ops.build_cache import cache_folder, clean, libraries
from minillm.ops.build_plan import KINDS
from minillm.recipes.common import folder_bytes, format_table


def build_kernels(kind: str | None = None) -> str:
    """Compile the kernels of a kind, unless it was done before; None: "cuda" where torch sees a GPU, else "cpu"."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if found := built(kind):
        facts = _facts(found)
        return f"{kind}: built {facts['built']} with {_compilers(facts)}; `minillm kernels clean` lets it be built anew"
    facts = _facts(build(kind))
    return f"{kind}: built in {facts['seconds']:.1f} s with {_compilers(facts)}"


def describe_kernels() -> str:
    """What runs each op, and why nothing faster does; the libraries, where they are, and why one cannot be built."""
    header = ("kernels", "built", "seconds", "with", "where, or why not")
    return "\n\n".join([describe_ops(), format_table(header, [_row(kind) for kind in KINDS]), _others()])


def describe_ops() -> str:
    """A table of what runs each op now, and for each faster implementation the reason why it does not."""
    rows = []
    for name, runs in ops.info().items():
        faster = "; ".join(f"{backend}: {why}" for backend, why in runs.items() if backend != "runs")
        rows.append((name, runs["runs"], faster or "-"))
    return format_table(("op", "runs", "faster ones"), rows)


def emulate_kernel(op: str, trace: bool = False, **settings: Any) -> str:
    """What a CUDA kernel does on the emulated GPU, step by step if `trace`; the settings are those of emulate.trace."""
    from minillm.ops import emulate

    assert op == "attention"
    first, *steps = emulate.trace(**settings).splitlines()
    return "\n".join([first, *(steps if trace else steps[-2:])])


def clean_kernels() -> str:
    """Remove all built kernels, and nothing else that is in their folder."""
    removed, left = clean()
    text = f"{removed:,} bytes removed from {cache_folder()}"
    return text + (f"; left alone, being built now: {', '.join(left)}" if left else "")


def _row(kind: str) -> tuple[str, ...]:
    if found := built(kind):
        facts = _facts(found)
        return kind, facts["built"], str(facts["seconds"]), _compilers(facts), str(found)
    earlier = any(library.parent.name.startswith(f"{kind}-") for library in libraries())
    why = "only of other sources or flags" if earlier else "not asked for"
    return kind, "no", "-", "-", obstacle(kind) or f"{why}: minillm kernels build {kind}"


def _others() -> str:
    """The builds that no kind uses now: of other sources, flags, or mutants."""
    others = [library for library in libraries() if library not in map(built, KINDS)]
    size = sum(folder_bytes(library.parent) for library in others)
    return f"other builds in {cache_folder()}: {len(others)}, {size:,} bytes; `minillm kernels clean` removes all"


def _facts(library: Path) -> dict[str, Any]:
    return read_json(library.with_name("build.json"))


def _compilers(facts: dict[str, Any]) -> str:
    return " and ".join(facts["compilers"].values())
