"""A study from end to end: what its table, pictures and report say is what its files hold."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minillm.cli import main
from minillm.data.tasks import Text
from minillm.files import read_json
from minillm.recipes.compare import ROWS, compare
from minillm.recipes.compare.intervals import draw_scores, interval
from minillm.recipes.compare.output import as_csv, as_text


def accuracy(said, right):
    return sum(a == b for a, b in zip(said, right, strict=True)) / len(right)


@pytest.fixture
def study(config, task, held_out, no_costs):
    methods = ("head", "full", "lora", "qlora", "prompt")
    return compare(config(methods=methods, held_out=str(held_out), held_out_rows=4, keep_adapters=True), task())


def test_every_cell_follows_from_the_files(study, task):
    shown = read_json(study / "results.json")
    assert (shown["task"], shown["metric"], len(shown["rows"])) == ("colours", "accuracy", 5)
    right = [record.label for record in task()["test"]]
    everything = {}
    for row in shown["rows"]:
        runs = [read_json(study / "rows" / row["row"] / f"seed-{seed}" / "result.json") for seed in (1, 2)]
        kept = [read_json(study / "rows" / row["row"] / f"seed-{seed}" / "predictions.json") for seed in (1, 2)]
        assert all(each["references"] == right and each["split"] == "test" for each in kept)
        scores = [accuracy(each["predictions"], right) for each in kept]
        everything[row["row"]] = [each["predictions"] for each in kept]
        assert row["scores"] == scores and row["score"] == pytest.approx(statistics.fmean(scores))
        assert row["std"] == pytest.approx(statistics.stdev(scores))
        adapters = [study / "rows" / row["row"] / f"seed-{seed}" / "adapter" for seed in (1, 2)]
        assert row["artefact_bytes"] == sum(file.stat().st_size for file in adapters[0].iterdir())
        trained = load_file(adapters[0] / "adapter_model.safetensors")
        assert row["trainable"] == sum(tensor.numel() for tensor in trained.values())
        assert row["share"] == row["trainable"] / row["total"]
        assert row["step_cpu_seconds"] == pytest.approx(statistics.median(run["step_cpu_seconds"] for run in runs))
        assert row["joules"] == pytest.approx(statistics.fmean(15.0 * run["train_cpu_seconds"] for run in runs))
        assert row["rate"] in ROWS[row["row"]].rates[:2] and all(run["rate"] == row["rate"] for run in runs)
        for side in ("on", "off"):
            known = [run["forgetting"][side] for run in runs]
            assert row.get(f"forgetting_{side}") == (None if None in known else pytest.approx(statistics.fmean(known)))
        assert (row["memory_added"], row["unmerged"]) == (1_000_000, 1.5)
    for row in shown["rows"]:  # the intervals by a bootstrap written anew
        low, high = _bootstrap(everything[row["row"]], right)
        assert row["interval"] == pytest.approx([low, high])
        if row["row"] != "full":
            assert row["to_full"] == pytest.approx(_bootstrap(everything[row["row"]], right, everything["full"]))


def _bootstrap(said, right, other=None):
    rng, found, right = np.random.default_rng(0), [], np.array(right)
    hits = np.array([np.array(each) == right for each in said], dtype=float)
    hits = hits if other is None else hits - np.array([np.array(each) == right for each in other], dtype=float)
    for _ in range(500):
        seeds, records = rng.integers(2, size=2), rng.integers(16, size=16)
        found.append(hits[seeds][:, records].mean())
    return list(np.percentile(found, [2.5, 97.5]))


def test_forgetting_is_exactly_zero_with_the_method_off(study):
    rows = {row["row"]: row for row in read_json(study / "results.json")["rows"]}
    assert all(rows[name]["forgetting_off"] == 0 for name in ("head", "lora", "prompt"))
    assert rows["head"]["forgetting_on"] == 0 and rows["lora"]["forgetting_on"] != 0
    assert "forgetting_off" not in rows["full"] and rows["full"]["forgetting_on"] != 0  # it cannot be switched off
    assert rows["qlora"]["forgetting_off"] != 0  # its base is rounded
    assert "| 0 |" in (study / "table.md").read_text()


def test_table_and_report(study):
    rows = read_json(study / "results.json")["rows"]
    table = (study / "table.md").read_text()
    for row in rows:
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['title']}"))
        assert f"{row['score']:.3f} ± {row['std']:.3f}" in line and f"{row['trainable']:,}" in line
        assert f"{row['rate']:g}" in line and "1.50 x" in line and "1.0 MB" in line
    with open(study / "table.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [float(line["score"]) for line in found] == [row["score"] for row in rows]
    page = (study / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and 'src="plots' not in page and "<script" not in page
    assert all(f"{row['title']}: {row['score']:.3f}" in page for row in rows)  # in words too, for who sees no picture
    assert page.count('alt="') == 3 and "15 W" in page and "an estimate" in page.replace("\n", " ")


def test_the_kept_adapter_is_the_model_that_was_judged(study, task, config):
    """Loaded again, it says what predictions.json says."""
    from minillm.recipes.compare.examples import make_problem
    from minillm.recipes.compare.find import find_base
    from minillm.recipes.locate import load

    adapter = study / "rows" / "lora" / "seed-1" / "adapter"
    model, tokenizer, _, labels = load(adapter, base=config().base, writes=False)
    problem = make_problem(find_base(config().base)[0], task(), config())
    said = read_json(adapter.parent / "predictions.json")["predictions"]
    assert list(labels) == ["red", "blue"] and problem.predict(model, "test") == said
    assert tokenizer.fingerprint == problem.tokenizer.fingerprint


def test_a_bad_run_does_not_lose_the_rest(config, task, no_costs, monkeypatch):
    """A rate that explodes, a seed without memory, a method that the base cannot take."""
    from dataclasses import replace

    from minillm.recipes.compare import rows, scoreboard
    from minillm.recipes.compare import trial as trials

    monkeypatch.setitem(rows.ROWS, "ia3", replace(ROWS["ia3"], rates=(3e-2, 1e30, 1e-2)))
    run_trial = scoreboard.run_trial

    def failing(problem, judge, row, rate, seed, folder, held_out=None):
        if (row.name, seed) == ("lora", 2):
            raise torch.OutOfMemoryError("no memory for 3 TB")
        return run_trial(problem, judge, row, rate, seed, folder, held_out)

    monkeypatch.setattr(scoreboard, "run_trial", failing)
    folder = compare(config("decoder", methods=("head", "bitfit", "ia3", "lora"), steps=6), task())
    found = {row["row"]: row for row in read_json(folder / "results.json")["rows"]}
    assert found["bitfit"]["status"] == "cannot" and "it has no biases" in found["bitfit"]["reason"]
    assert found["ia3"]["rate"] == 3e-2 and len(found["ia3"]["scores"]) == 2
    exploded = read_json(folder / "rows/ia3/choose-1e+30/result.json")
    assert "is not finite" in exploded["reason"] and "score" not in exploded
    assert found["lora"]["scores"] == [found["lora"]["score"]] and found["lora"]["std"] is None
    assert found["lora"]["reason"] == "1 of 2 seeds failed: no memory for 3 TB"
    assert len(found["head"]["scores"]) == 2
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    for text in (table, page):
        assert "cannot" in text and "it has no biases" in text and "no memory for 3 TB" in text
    assert read_json(folder / "rows/lora/seed-2/error.json")["type"] == "OutOfMemoryError"
    assert trials.reason(ValueError("it does not fit:\n  a: too wide\n  b")) == "a: too wide"


def test_a_study_in_which_everything_fails_still_says_why(config, task, no_costs, monkeypatch):
    from minillm.recipes.compare import scoreboard

    def failing(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(scoreboard, "run_trial", failing)
    folder = compare(config(methods=("head",)), task())
    (row,) = read_json(folder / "results.json")["rows"]
    assert row["status"] == "failed" and "broken" in (folder / "report.html").read_text()
    folder = compare(config(methods=("head",), rates=1, run=str(folder.parent / "one")), task())
    (row,) = read_json(folder / "results.json")["rows"]
    assert row["status"] == "failed" and row["reason"] == "2 of 2 seeds failed: broken"


def test_the_command(bases, tmp_path, capsys, no_costs, monkeypatch, task):
    """`minillm compare` with three rows, on a task in a file; `--quick` sets what is not given."""
    monkeypatch.setattr("minillm.recipes.compare.scoreboard.find_task", lambda config: task())
    words = ["compare", f"base={bases['encoder']}", "task=colours", "methods=head,full,lora", "seeds=1", "rates=1",
             "steps=4", "batch_size=4", "length=48", f"run={tmp_path / 'study'}"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "3 methods on" in out and "full fine-tuning" in out and "report.html" in out
    assert main([*words, "--quick"]) == 2  # another study: --quick draws fewer records
    assert "config.train_records: 2000 now, 0 then" in capsys.readouterr().err
    words = [word for word in words if not word.startswith("run=")] + [f"run={tmp_path / 'quick'}"]
    assert main([*words, "test_records=8", "--quick"]) == 0
    assert "24 to learn from, 12 to choose by, 8 to report" in capsys.readouterr().out
    saved = read_json(tmp_path / "quick" / "study.json")
    assert saved["config.steps"] == 4 and saved["config.points"] == 3 and saved["config.train_records"] == 2000


def test_the_interval_of_a_mean():
    """Of scores that a normal distribution describes: 1.96 standard errors on either side, to a tenth."""
    rng = np.random.default_rng(1)
    right = [0] * 400
    said = [(rng.random(400) < 0.3).astype(int).tolist()]
    low, high = interval(draw_scores(lambda s, r, groups: accuracy(s, r), said, right, draws=1000))
    mean = accuracy(said[0], right)
    error = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert (low, high) == (pytest.approx(mean - error, abs=0.01), pytest.approx(mean + error, abs=0.01))


def test_groups_are_drawn_whole():
    drawn = []

    def look(said, right, groups):
        drawn.append((said, groups))
        return 0.0

    draw_scores(look, [[1, 1, 2, 3, 3, 3]], [0] * 6, ["a", "a", "b", "c", "c", "c"], draws=50)
    for said, groups in drawn:
        sizes = {1: 2, 2: 1, 3: 3}
        whole = {name: [s for s, g in zip(said, groups, strict=True) if g == name] for name in groups}
        assert len(whole) == 3 and all(len(set(part)) == 1 and len(part) == sizes[part[0]] for part in whole.values())


def test_a_metric_that_some_draws_do_not_allow_has_an_interval_all_the_same():
    def fussy(said, right, groups):
        if len(set(right)) < 2:
            raise ValueError("references that differ are needed")
        return accuracy(said, right)

    found = draw_scores(fussy, [[1, 0, 0]], [1, 0, 0], draws=200)
    assert np.isnan(found).any() and interval(found) == (1.0, 1.0)


def test_text_and_csv_of_entries():
    done = {"row": "a", "title": "A", "family": "f", "status": "done", "rate": 0.001, "score": 0.5, "std": None,
            "interval": (0.25, 0.75), "trainable": 1234, "total": 10000, "share": 0.1234, "scores": [0.5]}  # fmt: skip
    cannot = {"row": "b", "title": "B", "family": "f", "status": "cannot", "reason": "no biases"}
    lines = as_text([done, cannot], "accuracy").splitlines()
    assert "accuracy" in lines[0] and "0.500" in lines[2] and "12.34%" in lines[2] and "0.250 to 0.750" in lines[2]
    assert lines[3].split()[:3] == ["B", "-", "cannot"] and lines[4] == "- B: no biases"
    read = list(csv.DictReader(as_csv([done, cannot]).splitlines()))
    assert read[0]["interval"] == "0.25 0.75" and read[1]["score"] == "" and read[1]["reason"] == "no biases"
    assert isinstance(json.dumps(done), str) and Text("x", 0).group == ""
