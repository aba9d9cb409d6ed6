"""A task refuses what would make its scores meaningless."""

import dataclasses
import math

import pytest

from minillm.data.tasks import SPLITS, Choice, Question, Rewrite, Tagged, Task, Text


def task(*records, kind="classification", labels=("no", "yes"), metrics=("accuracy",), splits=None, **settings):
    """Every split holds the records, told apart by a word more."""
    made = {split: tuple(_in(split, record) for record in records) for split in SPLITS}
    return Task("mine", kind, made | (splits or {}), metrics, labels, **settings)


def _in(split, record):
    name = {Tagged: "words", Question: "question", Rewrite: "source"}.get(type(record), "text")
    value = getattr(record, name)
    return dataclasses.replace(record, **{name: _told_apart(value, split)})


def _told_apart(value, split):
    return f"{value} {split}" if isinstance(value, str) else (*value[:-1], split) if value else value


GOOD = {
    "classification": (Text("a", 0), Text("b", 1, second="c", group="g")),
    "regression": (Text("a", 0.5, second="b"),),
    "choice": (Choice("a", ("b", "c"), 1),),
    "tagging": (Tagged(("a", "b"), (0, 1)),),
    "question_answering": (Question("who?", "It was he.", ("he",), (7,)),),
    "rewriting": (Rewrite("a", ("b", "c")),),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_are_taken(kind):
    made = task(*GOOD[kind], kind=kind)
    assert made.score == "accuracy" and len(made["train"]) == len(GOOD[kind])


BAD = [
    ("classification", Text("a", 2), "label 2 is none of the numbers of no, yes"),
    ("classification", Text("a", -1), "label -1 is none"),
    ("classification", Text("a", True), "label True is none"),
    ("classification", Text("a", 0.0), "label 0.0 is none"),
    ("classification", Choice("a", ("b",), 0), "are no Text"),
    ("regression", Text("a", 1), "its score is 1, not a finite float"),
    ("regression", Text("a", math.nan), "its score is nan"),
    ("regression", Text("a", math.inf), "its score is inf"),
    ("choice", Choice("a", ("b", "c"), 2), "label 2 is none of the numbers of b, c"),
    ("tagging", Tagged(("a",), (0, 1)), "1 words and 2 tags"),
    ("tagging", Tagged(("a", "b"), (0, 7)), "label 7 is none"),
    ("tagging", Tagged((), ()), "0 words and 0 tags"),
    ("question_answering", Question("q", "context", (), ()), "0 answers and 0 places"),
    ("question_answering", Question("q", "context", ("text", "con"), (3,)), "2 answers and 1 places"),
    ("question_answering", Question("q", "context", ("text",), (2,)), "'text' does not stand where it should"),
    ("question_answering", Question("q", "context", ("",), (0,)), "the answer '' does not stand"),
    ("rewriting", Rewrite("a", ()), "or it has none"),
    ("rewriting", Rewrite("a", ("b", " ")), "a target is empty"),
]


@pytest.mark.parametrize("kind, record, message", BAD, ids=[f"{kind}-{message}" for kind, _, message in BAD])
def test_a_wrong_record_is_named_with_its_split_and_number(kind, record, message):
    with pytest.raises(ValueError, match=message) as error:
        task(GOOD[kind][0], record, kind=kind)
    assert "mine" in str(error.value) and "train" in str(error.value) and "1" in str(error.value)


def test_an_empty_text_is_wrong():
    with pytest.raises(ValueError, match="it is empty"):
        task(*GOOD["classification"], splits={"train": (Text(" ", 0),)})


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        task(Text("a", 5), metrics=(), splits={"test": ()})
    assert all(part in str(error.value) for part in ("metrics is empty", "no records in test", "train: 1", "valid: 1"))


def test_an_unknown_kind_names_the_kinds():
    with pytest.raises(ValueError, match="classification, regression"):
        task(*GOOD["classification"], kind="sorting")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_record_of_train_in_another_split_is_a_leak_whatever_its_label(split):
    shared = Text("the same", 0)
    leaking = {"train": (shared,), split: (Text("the same", 1), Text("another", 0))}
    with pytest.raises(ValueError, match="1 records of valid and test are also in train"):
        task(Text("a", 0), splits=leaking)
    task(Text("a", 0), splits=leaking, overlap=1)


def test_a_second_text_makes_another_record():
    own = {"train": (Text("a", 0, second="b"),), "valid": (Text("a", 0, second="c"),)}
    assert task(*GOOD["classification"], splits=own)["train"] == own["train"]


def test_a_task_cannot_be_changed_by_who_has_its_splits():
    splits = {split: [Text(split, 0)] for split in SPLITS}
    made = Task("mine", "classification", splits, ("accuracy",), ["only"])
    splits["train"].append(Text("late", 7))
    assert made["train"] == (Text("train", 0),) and made.labels == ("only",)
