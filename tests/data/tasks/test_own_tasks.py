"""Tasks of one's own: files and folders, and one error that lists everything that is wrong with them."""

import csv
import json
from collections import Counter

import pytest

from minillm.data.tasks import SPLITS, Choice, Question, Rewrite, Tagged, Task, Text, load_task
from minillm.data.tasks.save import save_task

REVIEWS = [{"text": f"text number {i}", "label": ("bad", "good", "good")[i % 3]} for i in range(60)]


def put(path, rows):
    """Write rows as the file's extension says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_one_file_is_cut_stratified_and_the_same_each_time(tmp_path, ending):
    path = put(tmp_path / f"reviews.{ending}", REVIEWS)
    task = load_task(path)
    assert (task.kind, task.labels, task.score) == ("classification", ("bad", "good"), "accuracy")
    assert {s: len(task[s]) for s in SPLITS} == {"train": 48, "valid": 6, "test": 6}
    for split, (bad, good) in {"train": (16, 32), "valid": (2, 4), "test": (2, 4)}.items():
        assert Counter(record.label for record in task[split]) == {0: bad, 1: good}
    assert {r.text for s in SPLITS for r in task[s]} == {row["text"] for row in REVIEWS}
    assert load_task(path).splits == task.splits != load_task(path, seed=1).splits
    assert {r.text: task.labels[r.label] for r in task["train"]}.items() <= {
        r["text"]: r["label"] for r in REVIEWS
    }.items()


def test_columns_may_have_other_names_or_numbers(tmp_path):
    rows = [{"review": row["text"], "stars": row["label"], "id": i} for i, row in enumerate(REVIEWS)]
    assert len(load_task(put(tmp_path / "a.csv", rows), text="review", label="stars")["train"]) == 48
    (tmp_path / "b.tsv").write_text("".join(f"{row['label']}\t{row['text']}\n" for row in REVIEWS))
    task = load_task(tmp_path / "b.tsv", label=0, text=1)
    assert task.labels == ("bad", "good") and sum(len(task[s]) for s in SPLITS) == 60


def test_pairs_scores_and_numbers(tmp_path):
    rows = [{"text": f"one {i}", "second": f"two {i}", "label": i / 4} for i in range(40)]
    task = load_task(put(tmp_path / "a.csv", rows))
    assert (task.kind, task.labels, task.score) == ("regression", (), "pearson")
    assert sum(len(task[s]) for s in SPLITS) == 40 and task["train"][0].second.startswith("two")
    whole = put(tmp_path / "b.jsonl", [{"text": f"t {i}", "label": i % 12} for i in range(60)])
    assert load_task(whole).labels == tuple(map(str, range(12)))  # in the order of numbers, not of letters
    assert load_task(whole, kind="regression")["train"][0].label in map(float, range(12))


def test_tags_questions_rewrites_and_choices(tmp_path):
    tagged = [{"words": ["a", f"w{i}"], "tags": ["DET", "NOUN"]} for i in range(20)]
    task = load_task(put(tmp_path / "a.jsonl", tagged))
    assert task.labels == ("DET", "NOUN") and task["train"][0].tags == (0, 1)
    spaced = [{"words": f"a w{i}", "tags": "DET NOUN"} for i in range(20)]
    assert set(load_task(put(tmp_path / "b.csv", spaced))["train"]) == set(task["train"])
    asked = [{"question": f"where {i}?", "context": f"not in here {i}, in Rome", "answer": "Rome"} for i in range(20)]
    assert load_task(put(tmp_path / "c.csv", asked))["test"][0].starts[0] > 10
    rewritten = [{"source": f"s {i}", "target": ["one, two", "three"]} for i in range(20)]
    assert load_task(put(tmp_path / "d.jsonl", rewritten))["train"][0].targets == ("one, two", "three")
    chosen = [{"text": f"t {i}", "choices": ["yes", "no"], "label": "no" if i % 2 else 0} for i in range(20)]
    assert {r.label for r in load_task(put(tmp_path / "e.jsonl", chosen))["train"]} == {0, 1}


def test_a_folder_with_all_splits_or_some(tmp_path):
    for name, rows in {"train": REVIEWS[:40], "dev": REVIEWS[40:50], "test": REVIEWS[50:]}.items():
        put(tmp_path / "all" / f"{name}.csv", rows)
    assert {s: len(load_task(tmp_path / "all")[s]) for s in SPLITS} == {"train": 40, "valid": 10, "test": 10}
    put(tmp_path / "some" / "train.csv", REVIEWS[:40])
    put(tmp_path / "some" / "test.jsonl", REVIEWS[40:])
    some = load_task(str(tmp_path / "some"))
    assert {s: len(some[s]) for s in SPLITS} == {"train": 36, "valid": 4, "test": 20}


def test_groups_stay_together_and_copies_are_left_out_with_a_warning(tmp_path):
    rows = [{"text": f"answer {i}", "label": "no" if i % 2 else "yes", "group": f"q{i // 3}"} for i in range(60)]
    task = load_task(put(tmp_path / "a.csv", rows))
    sides = [{record.group for record in task[s]} for s in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2]) and all(sides)
    copies = [*REVIEWS, {"text": "Text Number 3!", "label": "bad"}]
    with pytest.warns(UserWarning, match="left out 1 records that are copies of others"):
        task = load_task(put(tmp_path / "b.csv", copies))
    assert sum(len(task[s]) for s in SPLITS) == 60


def refused(path, *matches, **options):
    with pytest.raises(ValueError, match="cannot be used") as error:
        load_task(path, **options)
    for match in matches:
        assert match in str(error.value), str(error.value)
    return str(error.value)


def test_wrong_columns_are_named_with_what_there_is(tmp_path):
    rows = [{"review": "a", "stars": "b"}]
    refused(put(tmp_path / "a.csv", rows), "the columns review, stars fit no kind of task", 'label="stars"')
    refused(tmp_path / "a.csv", "classification needs a column 'label', there are stars, text", text="review",
            kind="classification")  # fmt: skip
    put(tmp_path / "b" / "train.csv", REVIEWS)
    put(tmp_path / "b" / "test.csv", [{"text": "a", "class": "good"}])
    refused(tmp_path / "b", "test: classification needs a column 'label', there are class, text")


def test_everything_wrong_is_said_at_once(tmp_path):
    train = [*REVIEWS[:40], {"text": " ", "label": "good"}]
    put(tmp_path / "train.csv", train)
    put(tmp_path / "valid.csv", [{"text": "new", "label": "awful"}, {"text": "newer", "label": ""}])
    put(tmp_path / "test.csv", [{"text": "Text number 0", "label": "good"}, {"text": "newest", "label": "fine"}])
    refused(
        tmp_path,
        "train: nothing in the column 'text' (1 rows: 42)",
        "valid: the label 'awful' stands in no row of train, which has bad, good (1 rows: 2)",
        "valid: nothing in the column 'label' (1 rows: 3)",
        "test: the label 'fine' stands in no row",
        "test: 1 records stand in train with another answer",
    )


def test_labels_that_cannot_be_learned(tmp_path):
    refused(
        put(tmp_path / "a.csv", [{"text": f"t{i}", "label": "x"} for i in range(9)]), "every row has the same label"
    )
    rows = [{"text": f"t {i}", "label": f"name{i}"} for i in range(60)]
    refused(put(tmp_path / "b.csv", rows), "60 different labels for 60 rows")
    rows = [{"text": f"t {i}", "label": value} for i, value in enumerate(["1.5", "nan", "2.5", "inf"])]
    refused(put(tmp_path / "c.csv", rows), "the label is no finite number (2 rows: 3, 5)")
    rows = [{"text": f"t {i}", "label": value} for i, value in enumerate([1.5, "two", True])]
    refused(put(tmp_path / "d.jsonl", rows), "the label is no finite number (2 rows: 2, 3)", kind="regression")
    rows = [{"text": f"t {i}", "label": 2.5} for i in range(9)]
    refused(put(tmp_path / "e.csv", rows), "every row has the same label, 2.5")


def test_a_label_that_stands_in_its_text(tmp_path):
    rows = [{"text": f"the answer is {row['label']}, {i}", "label": row["label"]} for i, row in enumerate(REVIEWS)]
    refused(put(tmp_path / "a.csv", rows), "the label's name stands in the text of 60 of 60 rows")
    rows = [{"text": row["label"], "second": f"{i}", "label": row["label"]} for i, row in enumerate(REVIEWS)]
    refused(put(tmp_path / "b.csv", rows), "the label's name stands in the text of 60 of 60 rows")
    fair = [{"text": f"good or bad? {i}", "label": row["label"]} for i, row in enumerate(REVIEWS)]
    assert len(load_task(put(tmp_path / "c.csv", fair))["train"]) == 48


def test_what_stands_in_two_splits(tmp_path):
    put(tmp_path / "train.csv", REVIEWS[:40])
    put(tmp_path / "test.csv", REVIEWS[39:])
    put(tmp_path / "valid.csv", [{"text": "fresh", "label": "bad"}])
    refused(tmp_path, "1 records of valid and test are also in train (known: 0)")
    assert len(load_task(tmp_path, overlap=1)["test"]) == 21


def test_rows_that_do_not_fit_their_kind(tmp_path):
    rows = [{"words": ["a", "b"], "tags": ["X"]}, {"words": ["a"], "tags": ["X"]}]
    refused(put(tmp_path / "a.jsonl", rows), "another number of tags than of words (1 rows: 1)")
    rows = [{"question": "q", "context": "c", "answer": "elsewhere"}]
    refused(put(tmp_path / "b.jsonl", rows), "the answer does not stand in the context")
    rows = [{"question": "q", "context": "c", "answer": "c", "start": 5}]
    refused(put(tmp_path / "c.jsonl", rows), "the answer does not stand in the context at start")
    refused(put(tmp_path / "c.jsonl", [{**rows[0], "start": "five"}]), "does not stand in the context at start")
    rows = [{"text": "t", "choices": ["a"], "label": 0}, {"text": "t", "choices": ["a", "b"], "label": 2}]
    refused(put(tmp_path / "d.jsonl", rows), "choices is no list of two texts or more", "none of the choices, nor")
    refused(put(tmp_path / "e.jsonl", [{"text": 5, "label": "a"}]), "text is a int, not a text")


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"no\.csv does not exist"):
        load_task(tmp_path / "no.csv")
    (tmp_path / "a.csv").write_text("text,label\n")
    refused(tmp_path / "a.csv", "no records in")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"b\.txt holds no records: its name must end with \.jsonl"):
        load_task(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").write_text('{"text": \n[1]\n')
    with pytest.raises(ValueError, match=r"c\.jsonl cannot be read:\n  line 1: not JSON.*\n  line 2: a JSON list"):
        load_task(tmp_path / "c.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file for train; a folder has train\.jsonl.*there are no files"):
        load_task(tmp_path / "empty")
    for name in ("train.csv", "train.jsonl"):
        put(tmp_path / "two" / name, REVIEWS)
    with pytest.raises(ValueError, match=r"several files for one split: train\.csv, train\.jsonl"):
        load_task(tmp_path / "two")
    refused(put(tmp_path / "f.csv", REVIEWS), "kind='clasification': did you mean classification", kind="clasification")
    with pytest.raises(ValueError, match=r"no such option; did you mean label\?"):
        load_task(tmp_path / "f.csv", lable="x")


def test_too_few_to_cut(tmp_path):
    refused(put(tmp_path / "a.csv", REVIEWS[:3]), "no records in valid, test")


SAVED = {
    "classification": Task("t", "classification", {s: (Text(f"{s} é", 0, "b", "g"), Text(f"{s} 2", 1)) for s in SPLITS},
                           ("accuracy",), ("no", "yes")),
    "regression": Task("t", "regression", {s: (Text(f"{s} 1", 0.5), Text(s, 1.0)) for s in SPLITS}, ("pearson",)),
    "tagging": Task("t", "tagging", {s: (Tagged((s, "b c"), (0, 1)),) for s in SPLITS}, ("accuracy",), ("A", "B")),
    "rewriting": Task("t", "rewriting", {s: (Rewrite(f"{s}\nx", ("y", "z")),) for s in SPLITS}, ("chrf",)),
    "choice": Task("t", "choice", {s: (Choice(s, ("a", "b"), 1),) for s in SPLITS}, ("accuracy",)),
    "question_answering": Task("t", "question_answering",
                               {s: (Question("q", f"{s} a a", ("a", "a"), (len(s) + 1, len(s) + 3)),) for s in SPLITS},
                               ("exact_match",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_what_is_saved_comes_back(tmp_path, kind):
    save_task(SAVED[kind], tmp_path / "t")
    back = load_task(tmp_path / "t")
    assert (back.kind, back.splits, back.labels) == (kind, SAVED[kind].splits, SAVED[kind].labels)


@pytest.mark.parametrize("name", ["nli", "similarity", "entities", "qa", "translation"])
def test_generated_tasks_come_back(tmp_path, name):
    task = load_task(name, train=40, valid=10, test=10)
    save_task(task, tmp_path / "t")
    back = load_task(tmp_path / "t")
    assert back.kind == task.kind and [len(back[s]) for s in SPLITS] == [40, 10, 10]
    if not task.labels:
        assert back.splits == task.splits
