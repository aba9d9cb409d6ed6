"""Measure, and record in benchmarks/results/.

    python benchmarks/run.py                  # everything, some minutes
    python benchmarks/run.py decode head_loss

Needs the `test` extra (transformers, peft) and Linux. Then `python benchmarks/table.py` writes the README's table.
"""

import importlib
import sys

from common import record
from table import NAMES, NATIVE


def main() -> None:
    names = sys.argv[1:] or NAMES + NATIVE
    if unknown := [name for name in names if name not in NAMES + NATIVE]:
        raise SystemExit(f"no benchmark called {', '.join(unknown)}; there are {', '.join(NAMES + NATIVE)}")
    for name in names:
        benchmark = importlib.import_module(name)
        for goal in record(name, benchmark.measure(), benchmark.GOALS)["goals"]:
            verdict = "met" if goal["met"] else "missed"
            print(f"{goal['what']}: {goal['measured']} (goal {goal['goal']}: {verdict})", flush=True)


if __name__ == "__main__":
    main()
