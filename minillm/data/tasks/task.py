"""What a task is: records in three splits, what is to be said of each, and how an answer is scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

Kind = Literal["classification", "regression", "choice", "tagging", "question_answering", "rewriting"]
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts, and its class (a number into `Task.labels`) or its score (a float).

    `group` names what records are judged together, such as the question of which this is one answer; "" for none.
    """

    text: str
    label: int | float
    second: str | None = None
    group: str = ""

    def flaw(self, labels: Sequence[str] | None) -> str:
        """What is wrong with the record, or ""; `labels` is None where the label is a score."""
        if not f"{self.text}{self.second or ''}".strip():
            return "it is empty"
        if labels is not None:
            return _no_number_of(self.label, labels)
        finite = isinstance(self.label, float) and math.isfinite(self.label)
        return "" if finite else f"its score is {self.label!r}, not a finite float"


@dataclass(frozen=True)
class Choice:
    """A text, and which of several continuations or answers fits it: a number into `choices`."""

    text: str
    choices: tuple[str, ...]
    label: int

    def flaw(self, labels: Sequence[str] | None) -> str:
        if not all(text.strip() for text in (self.text, *self.choices)):
            return "its text or a choice is empty"
        return _no_number_of(self.label, self.choices)


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence and the tag of each, a number into `Task.labels`."""

    words: tuple[str, ...]
    tags: tuple[int, ...]

    def flaw(self, labels: Sequence[str] | None) -> str:
        if not self.words or len(self.words) != len(self.tags):
            return f"{len(self.words)} words and {len(self.tags)} tags"
        return next((flaw for tag in self.tags if (flaw := _no_number_of(tag, labels or ()))), "")


@dataclass(frozen=True)
class Question:
    """A question, a paragraph that answers it, and the answers that count as right, each with its first character."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    def flaw(self, labels: Sequence[str] | None) -> str:
        if not self.question.strip() or not self.answers or len(self.answers) != len(self.starts):
            return f"the question {self.question!r} has {len(self.answers)} answers and {len(self.starts)} places"
        places = zip(self.answers, self.starts, strict=True)
        lost = [a for a, start in places if not a or self.context[max(start, 0) : start + len(a)] != a]
        return f"the answer {lost[0]!r} does not stand where it should" if lost else ""


@dataclass(frozen=True)
class Rewrite:
    """A text and what it should become; any of `targets` is right, the first is learned."""

    source: str
    targets: tuple[str, ...]

    def flaw(self, labels: Sequence[str] | None) -> str:
        empty = not self.source.strip() or not self.targets or not all(target.strip() for target in self.targets)
        return "its source or a target is empty, or it has none" if empty else ""


def _no_number_of(label: Any, names: Sequence[str]) -> str:
    """Why `label` is no number of one of the names; "" if it is."""
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return ""
    return f"the label {label!r} is none of the numbers of {', '.join(names) or 'no labels'}"


Record: TypeAlias = Text | Choice | Tagged | Question | Rewrite
RECORDS: Mapping[str, type] = MappingProxyType(
    {
        "classification": Text,
        "regression": Text,
        "choice": Choice,
        "tagging": Tagged,
        "question_answering": Question,
        "rewriting": Rewrite,
    }
)


@dataclass(frozen=True)
class Task:
    """Records to learn from (train), to choose by (valid) and to report (test), each split a tuple of records.

    labels: the names of the classes or tags, in the order of their numbers; () for the other kinds.
    metrics: names in `minillm.evaluation.METRICS`; the first is the score, more is better.
    ceiling: the best score that can be had, 1 where each answer follows from its record; None if nobody knows.
    counting: the score of a classifier that counts words and reads no order, as measured; None if nobody has.
    overlap: how many records of valid and test are known to stand in train as well. Published sets have some; a task
        with more than it says is refused, because its scores would measure memory.
    """

    name: str
    kind: Kind
    splits: Mapping[str, tuple[Record, ...]] = field(repr=False)
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    description: str = ""
    source: str = ""  # where the records come from, and who says so
    licence: str = ""
    overlap: int = 0
    ceiling: float | None = None
    counting: float | None = None

    def __post_init__(self):
        own = {split: tuple(records) for split, records in self.splits.items()}
        object.__setattr__(self, "splits", MappingProxyType(own))  # the one way to finish a frozen dataclass
        object.__setattr__(self, "labels", tuple(self.labels))
        wrong = self._flaws()
        if wrong:
            raise ValueError(f"the task {self.name!r} cannot be used:\n  " + "\n  ".join(wrong))

    @property
    def score(self) -> str:
        """The metric that counts."""
        return self.metrics[0]

    def __getitem__(self, split: str) -> tuple[Record, ...]:
        return self.splits[split]

    def _flaws(self) -> list[str]:
        if self.kind not in get_args(Kind):
            return [f"kind={self.kind!r}: one of {', '.join(get_args(Kind))}"]
        wrong = [] if self.metrics else ["metrics is empty: name the one that is the score"]
        if missing := [split for split in SPLITS if not self.splits.get(split)]:
            wrong.append(f"no records in {', '.join(missing)}: bring some, or cut them from another split")
        expected, labels = RECORDS[self.kind], None if self.kind == "regression" else self.labels
        for split, records in self.splits.items():
            strange = [i for i, record in enumerate(records) if not isinstance(record, expected)]
            flaws = [(i, flaw) for i, r in enumerate(records) if i not in set(strange) and (flaw := r.flaw(labels))]
            if strange:
                wrong.append(f"{split}: {len(strange)} records are no {expected.__name__}, the first is {strange[0]}")
            if flaws:
                wrong.append(f"{split}: {len(flaws)} records are wrong, the first is {flaws[0][0]}: {flaws[0][1]}")
        return wrong or self._leaks()

    def _leaks(self) -> list[str]:
        seen = {content(record) for record in self.splits["train"]}
        found = [r for split in SPLITS[1:] for r in self.splits[split] if content(r) in seen]
        if len(found) <= self.overlap:
            return []
        return [f"{len(found)} records of valid and test are also in train (known: {self.overlap}): {found[0]}"]


def content(record: Record) -> tuple[Any, ...]:
    """What the model is shown of a record."""
    hidden = {"label", "tags", "answers", "starts", "targets", "group"}
    return tuple(getattr(record, f.name) for f in fields(record) if f.name not in hidden)
