"""Tasks: what a model is fine-tuned for and judged by."""

from minillm.data.tasks.registry import TASKS, load_task, register_task
from minillm.data.tasks.task import RECORDS, SPLITS, Choice, Question, Record, Rewrite, Tagged, Task, Text

__all__ = [
    "RECORDS",
    "SPLITS",
    "TASKS",
    "Choice",
    "Question",
    "Record",
    "Rewrite",
    "Tagged",
    "Task",
    "Text",
    "load_task",
    "register_task",
]
