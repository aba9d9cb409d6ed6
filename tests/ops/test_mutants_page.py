"""Every line that a CUDA kernel could lose is on trial in some test file, and csrc/cuda/MUTANTS.md tells of all.

Each `kept(number)` in csrc/cuda is one trial. A test file with trials has a dict MUTANTS, number -> what is left out
(`.without`) and what notices (`.killer`). `python tests/ops/test_mutants_page.py` writes the page.
"""

import importlib
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mutants import KILLERS

from minillm.ops.build_plan import SOURCES

FOLDER, CUDA = Path(__file__).parent, SOURCES / "cuda"
PAGE = CUDA / "MUTANTS.md"
ORDERS_THREADS = (
    r"__syncthreads|__syncwarp|wait_for_copies|"
    r"\b(wait|arrive\w*|announce_barriers|fence_registers|commit_products|wait_for_products)\("
)
WORDS = ("device.cuh", "hopper.cuh", "wgmma.cuh")  # they define these words


class Trial(NamedTuple):
    source: str
    without: str
    killer: str
    test: str


@cache
def in_the_sources() -> dict[int, str]:
    """The number of each mutant -> the file where it stands."""
    found = {}
    for file in sorted(CUDA.glob("*.cu*")):
        for number in re.findall(r"kept\((\d+)\)", file.read_text()):
            assert found.setdefault(int(number), file.name) == file.name, f"two files have a mutant {number}"
    return found


@cache
def on_trial() -> dict[int, tuple[str, str, str]]:
    """number -> what is left out, what notices, and the test file that says so."""
    found = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        if re.search(r"^MUTANTS\b", path.read_text(), re.MULTILINE):
            for number, mutant in importlib.import_module(path.stem).MUTANTS.items():
                assert number not in found, f"mutant {number} is on trial in {path.name} and in {found[number][2]}"
                found[number] = (mutant.without, mutant.killer, path.name)
    return found


def page() -> str:
    trials = {number: Trial(source, *on_trial()[number]) for number, source in sorted(in_the_sources().items())}
    counts = Counter(trial.killer for trial in trials.values())
    lines = [
        "# What the CUDA kernels cannot do without",
        "",
        f"Each `kept(number)` guards a barrier, a bound, a wait or a rescaling: {len(trials)} in all. On the emulated",
        "GPU each is left out in turn, and a check must notice. Try one yourself:",
        "",
        '    emulate.attention(q, k, v, stage="v2", machine=emulate.Machine(mutant=202))',
        "",
        *(f"- *{killer}* ({counts[killer]}): {KILLERS[killer].meaning}" for killer in KILLERS if counts[killer]),
        "",
        "This page is written by `python tests/ops/test_mutants_page.py`.",
        "",
        "| number | file | what is left out | noticed by | in |",
        "| ---: | --- | --- | --- | --- |",
        *(f"| {n} | `{t.source}` | {t.without} | {t.killer} | `{t.test}` |" for n, t in trials.items()),
    ]
    return "\n".join(lines) + "\n"


def test_every_line_that_could_be_left_out_is_on_trial():
    assert sorted(in_the_sources()) == sorted(on_trial())


def test_every_killer_is_explained():
    assert {killer for _, killer, _ in on_trial().values()} <= set(KILLERS)


def test_every_barrier_and_wait_is_on_trial():
    for file in sorted(CUDA.glob("*.cu*")):
        for line in file.read_text().splitlines() if file.name not in WORDS else ():
            if re.search(ORDERS_THREADS, line.partition("//")[0]):
                assert "kept(" in line, f"{file.name}: {line.strip()}"


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python tests/ops/test_mutants_page.py"


if __name__ == "__main__":
    PAGE.write_text(page())
