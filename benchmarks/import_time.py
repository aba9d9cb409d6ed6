"""What importing minillm costs on top of `import torch`.

    python benchmarks/run.py import_time

Each time in a new Python.
"""

import statistics
import subprocess
import sys

from common import Goal

GOALS = [
    Goal("`import minillm` with ops to training, minus `import torch`, CPU seconds", ("seconds_with_parts",), 0.15)
]

PROGRAM = """
import time, torch
start = time.process_time()
import minillm
middle = time.process_time()
import minillm.ops, minillm.layers, minillm.models, minillm.peft, minillm.data, minillm.generation, minillm.training
print(middle - start, time.process_time() - start)
"""


def measure(repeats: int = 9) -> dict:
    """Median seconds for `import minillm` alone, which is nothing, and for its parts as well, which every use needs."""
    samples = []
    for _ in range(repeats + 1):  # the first one compiles to bytecode
        run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True)
        samples.append([round(float(seconds), 4) for seconds in run.stdout.split()])
    package, parts = zip(*samples[1:], strict=True)
    return {
        "seconds": statistics.median(package),
        "seconds_with_parts": statistics.median(parts),
        "samples": package,
        "samples_with_parts": parts,
    }
