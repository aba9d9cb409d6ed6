"""Bad input: one clear error each, before anything is trained."""

import pytest

from minillm.cli import main
from minillm.data.tasks import Task
from minillm.recipes.compare import compare


@pytest.mark.parametrize(
    ("changes", "flaw"),
    [
        ({"seeds": 0}, "seeds=0: at least 1"),
        ({"rates": 0}, "rates=0: from 1 to 3"),
        ({"rates": 4}, "rates=4: from 1 to 3"),
        ({"steps": 0, "batch_size": 0}, "steps=0: at least 1\n  batch_size=0: at least 1"),
        ({"watts": 0.0}, "watts=0.0: a number above 0"),
        ({"task_seed": -1}, "task_seed=-1: a whole number"),
    ],
)
def test_settings(changes, flaw, config):
    with pytest.raises(ValueError, match=f"this study cannot be done:\n  {flaw}"):
        config(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "flaw"),
    [
        ("classification", {"base": ""}, "base: which model"),
        ("classification", {"base": "tiny-encodr"}, "base: tiny-encodr does not exist"),
        ("classification", {"methods": ("lroa",)}, "methods: there is no 'lroa'; did you mean .*lora"),
        ("classification", {"metric": "acuracy"}, "metric: there is no 'acuracy'; did you mean accuracy"),
        ("classification", {"metric": "span_f1"}, "metric: it does not fit the answers of this task: span_f1: "),
        (
            "regression",
            {"metric": "accuracy"},
            "metric: it does not fit .* accuracy: labels are whole numbers",
        ),
        ("classification", {"metric": "group_exact_match"}, "group_exact_match: group_exact_match needs groups="),
        ("rewriting", {}, "an encoder writes none"),
        ("classification", {"length": 97}, "length=97 is more than the base's max_positions=96"),
        ("classification", {"batch_size": 30}, "fewer than batch_size=30"),
    ],
)
def test_what_does_not_fit(kind, changes, flaw, config, task, tmp_path):
    with pytest.raises(ValueError, match=flaw):
        compare(config(**changes), task(kind))
    assert not (tmp_path / "study").exists()


def test_empty_splits(task):
    with pytest.raises(ValueError, match="no records in valid, test: bring some, or cut them from another split"):
        Task("empty", "classification", {"train": task()["train"]}, ("accuracy",), ("a", "b"))


def test_an_adapter_is_no_base(config, task, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, and every method starts from a whole model: name its base"):
        compare(config(base=str(tmp_path)), task())


def test_a_method_that_leaves_no_position_for_the_text(config, task, no_costs):
    from minillm.files import read_json

    folder = compare(config(methods=("head", "prompt"), length=90, seeds=1, rates=1), task())
    rows = {row["row"]: row for row in read_json(folder / "results.json")["rows"]}
    assert rows["prompt"]["reason"] == "it takes 10 of 96 positions, and length=90" and rows["head"]["scores"]


def test_a_score_that_is_no_number_fails_its_run_alone(config, task, no_costs, monkeypatch):
    from minillm.evaluation import metrics
    from minillm.files import read_json

    known = dict(metrics.METRICS)
    calls = []

    def sometimes(said, right, groups=None):
        calls.append(said)
        return float("nan") if len(calls) == 2 else 0.5  # the first call is the check before anything

    monkeypatch.setattr("minillm.recipes.compare.judge.METRICS", known | {"sometimes": sometimes})
    folder = compare(config(metric="sometimes", methods=("head",)), task())
    (row,) = read_json(folder / "results.json")["rows"]
    failed = read_json(folder / "rows/head/choose-0.01/result.json")
    assert failed["reason"] == "the score on valid is not a number: sometimes is nan"
    assert row["rate"] == 3e-3 and row["scores"] == [0.5, 0.5]


def test_processes_need_one_folder(config, task, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="several processes share one folder: name it, run=FOLDER"):
        compare(config(run=""), task())


def test_the_command_says_it(capsys):
    assert main(["compare", "task=sentiment"]) == 2
    assert "base: which model" in capsys.readouterr().err
    assert main(["compare", "sedes=3"]) == 2
    assert "CompareConfig has no 'sedes'; did you mean seeds" in capsys.readouterr().err
