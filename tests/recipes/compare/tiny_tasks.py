"""Tasks of each kind in which one word decides, for tests and for the processes that they start."""

import random

from minillm.data.tasks import Choice, Question, Rewrite, Tagged, Task, Text

COLOURS = ("red", "blue")
LABELS = {"classification": COLOURS, "tagging": ("O", "B-n")}
METRIC = {"regression": "pearson", "question_answering": "exact_match", "rewriting": "exact_match"}


def make_task(kind="classification", sizes=(24, 12, 16), seed=0):
    """The records are numbered, so none stands in two splits."""
    draw, splits, at = random.Random(seed), {}, 0
    for split, size in zip(("train", "valid", "test"), sizes, strict=True):
        splits[split] = tuple(_record(kind, at + i, draw) for i in range(size))
        at += size
    return Task("colours", kind, splits, (METRIC.get(kind, "accuracy"),), LABELS.get(kind, ()))


def _record(kind, number, draw):
    label, what = draw.randrange(2), draw.choice(("hat", "cat"))
    colour = COLOURS[label]
    if kind == "classification":
        return Text(f"{what} {number} {colour}", label)
    if kind == "regression":
        return Text(f"{what} {number}", label + draw.random(), f"it is {colour}")
    if kind == "choice":
        return Choice(f"{what} {number} {colour}", COLOURS, label)
    if kind == "tagging":
        return Tagged(("the", what, str(number)), (0, label, 1))
    if kind == "question_answering":
        context = f"{what} {number} is {colour}."
        return Question("Which?", context, (colour,), (context.index(colour),))
    return Rewrite(f"{what} {number}", (colour,))
