"""`minillm compare`: one fair scoreboard of all methods, and how to add to it.

A method    `register_row(Row(...))` in a Python file of yours, which then calls `compare(CompareConfig(...))`
A base      `base=FOLDER`, any run or model folder
A task      `task=FILE`, records as `minillm.data.tasks.load_task` reads them, or in Python `compare(config, task)`
A metric    a function f(predictions, references) -> float, more is better, behind `@minillm.evaluation.metrics.metric`
"""

from minillm.recipes.compare.config import CompareConfig, quick
from minillm.recipes.compare.rows import ROWS, Row, register_row
from minillm.recipes.compare.scoreboard import compare

__all__ = ["ROWS", "CompareConfig", "Row", "compare", "quick", "register_row"]
