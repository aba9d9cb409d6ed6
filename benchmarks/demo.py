"""Run `minillm demo` as it is and record its numbers and pictures in benchmarks/results/demo/.

    python benchmarks/demo.py

Needs an idle machine for its seconds to mean anything. Then `python benchmarks/table.py` writes the README's section.
"""

import shutil
import tempfile
from pathlib import Path

from table import RESULTS

from minillm.files import atomic_folder
from minillm.recipes.demo import DemoConfig, demo

KEPT = ("report.json", "environment.json", "plots/trade_off.png", "plots/loss.png", "plots/attention.png")
KEPT += ("plots/next_token.png",)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = demo(DemoConfig(run=str(Path(temporary) / "demo")))
        with atomic_folder(RESULTS / "demo") as folder:
            for name in KEPT:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(run / name, folder / name)


if __name__ == "__main__":
    main()
