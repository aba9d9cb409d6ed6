"""The metrics by which a task is judged."""

from collections.abc import Sequence
from typing import Any

from minillm.config import nearest
from minillm.data.tasks import Task
from minillm.evaluation.metrics import METRICS


class Judge:
    """The metrics of a task; `metric` is its score, the one that the config asks for or the task's first."""

    def __init__(self, task: Task, metric: str = ""):
        self.metric = metric or task.score
        self.names = tuple(dict.fromkeys((self.metric, *task.metrics)))
        if unknown := [name for name in self.names if name not in METRICS]:
            lines = [f"there is no {name!r}; did you mean {nearest(name, METRICS)}?" for name in unknown]
            raise ValueError("metric: " + "\n  ".join(lines))

    def measure(
        self, predictions: Sequence[Any], references: Sequence[Any], groups: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Every metric; ValueError for what a metric cannot judge."""
        return {name: METRICS[name](predictions, references, groups=groups) for name in self.names}

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], groups: Sequence[str] | None = None
    ) -> float:
        """The score alone."""
        return METRICS[self.metric](predictions, references, groups=groups)

    def check(self, perfect: Sequence[Any], references: Sequence[Any], groups: Sequence[str] | None = None) -> None:
        """ValueError unless every metric can judge answers that could not be better: before anything is trained."""
        wrong = []
        for name in self.names:
            try:
                METRICS[name](perfect, references, groups=groups)
            except (ValueError, TypeError) as error:  # a TypeError: answers of another type than it reads
                wrong.append(f"{name}: {error}")
        if wrong:
            raise ValueError("metric: it does not fit the answers of this task: " + "\n  ".join(wrong))
