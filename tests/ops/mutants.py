"""How a line that was left out of a kernel is noticed: by what the emulated GPU reports, by what it counts, or by the
numbers. Each `kept(number)` in csrc/cuda is one trial, in the MUTANTS of some test file (see test_mutants_page.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from minillm.ops.emulator import EmulationError, Machine


class Killer(NamedTuple):
    meaning: str
    report: str = ""  # of the emulated GPU
    counted: str = ""  # more of it than need be, with a result that is right


KILLERS = {
    "wrong numbers": Killer("the result is not that of the formula in float64, or not as near as PyTorch's"),
    "race": Killer("two threads touch the same memory, and no barrier lies between", "race:"),
    "memory outside every tensor": Killer(
        "global memory is read or written past the end of a tensor", "outside every tensor"
    ),
    "shared memory outside": Killer("so is the memory that a block shares", "shared memory outside the block's"),
    "address between": Killer("16 bytes are read where none of them begin", "16 bytes at an address between"),
    "copy under way": Killer(
        "shared memory is used before an asynchronous copy to it was waited for", "copy to it is under way"
    ),
    "product under way": Killer(
        "registers are used, or a thread leaves, before a product was waited for",
        "a product under way|its product is under way",
    ),
    "deadlock": Killer("threads wait at an mbarrier for what never comes", "deadlock:"),
    "broken rule": Killer(
        "of the copy engine, of mbarriers or of wgmma: see what the emulated GPU says",
        "is no multiple of|which no copy fills|misses no arrival|told to expect|was not told of|no fence orders",
    ),
    "needless reads": Killer("the result is right, but more bytes are read than need be", counted="global_read"),
    "bank conflicts": Killer(
        "the result is right, but the rows that ldmatrix reads at once lie in the same banks", counted="conflicts"
    ),
}
WRONG, RACE, OUTSIDE, OUTSIDE_SHARED, BETWEEN, IN_FLIGHT, MULTIPLYING, DEADLOCK, RULE, NEEDLESS, CONFLICTS = KILLERS


def check_killed(number: int, killer: str, run: Callable[[Machine], object], path: Path | None = None) -> None:
    """`run` runs a kernel and checks its numbers: it passes with the line in question, and not without."""
    _, report, counted = KILLERS[killer]
    normal, mutant = Machine(path=path), Machine(path=path, mutant=number)
    run(normal)
    assert not normal.reached_mutant
    if counted:
        run(mutant)
        assert getattr(mutant.counts, counted) > getattr(normal.counts, counted)
    else:
        with pytest.raises(EmulationError if report else AssertionError, match=report or None):
            run(mutant)
    assert mutant.reached_mutant
