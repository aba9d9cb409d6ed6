"""A study's folder: killed, resumed, shared by processes, and kept apart from other studies."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.files import read_json
from minillm.recipes.compare import ROWS, compare
from minillm.recipes.compare.claims import claim
from minillm.recipes.compare.study import Study

SCRIPT = Path(__file__).with_name("study_process.py")
RUNS = 3 * (2 + 2)  # rows: two rates to choose from, two reported seeds
TIMES = ("step_cpu_seconds", "train_cpu_seconds", "joules", "unmerged", "merged")


def start(*words, **environment):
    root = str(Path(__file__).parents[3])
    environment |= {"PYTHONPATH": f"{root}{os.pathsep}{SCRIPT.parent}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, words)], env=os.environ | environment, **pipes)


def results(folder):
    """Every result by its run, without the times."""
    found = {}
    for path in sorted(folder.rglob("result.json")):
        values = read_json(path)
        found[str(path.parent.relative_to(folder))] = {k: v for k, v in values.items() if k not in TIMES}
    return found


@pytest.mark.slow
def test_a_killed_study_goes_on(bases, tmp_path):
    """Nothing that was done is done again, the run that died is done anew, and the end is that of an unbroken study."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log, base = tmp_path / "log", bases["encoder"]
    process = start(broken, base, log, 5)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed = log.read_text().split()
    before = {path: path.read_bytes() for path in broken.rglob("result.json")}
    # the fifth run died; the four before it, and the first row's costs, are kept
    assert len(killed) == 5 and len(before) == 5 and not (broken / "results.json").exists()
    assert (broken / "rows" / killed[4] / "metrics.jsonl").exists()

    process = start(broken, base, log)
    assert process.communicate() and process.returncode == 0
    again = log.read_text().split()[5:]
    assert again[0] == killed[4] and not set(again) & set(killed[:4]) and len(again) == RUNS - 4
    assert all(path.read_bytes() == content for path, content in before.items())
    process = start(whole, base, tmp_path / "other")
    assert process.communicate() and process.returncode == 0
    assert results(whole) == results(broken) and len(results(whole)) == RUNS + 3
    assert not [path for path in broken.rglob(".*")]


@pytest.mark.slow
def test_two_processes_share_a_study(bases, tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path / "study", bases["encoder"], log, RANK=str(rank)) for rank in range(2)]  # as torchrun does
    for rank, process in enumerate(both):
        printed, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        assert (b"frozen + head" in printed) == (rank == 0)  # one of them shows the table
    done = log.read_text().split()
    assert len(done) == len(set(done)) == RUNS
    assert len(results(tmp_path / "study")) == RUNS + 3


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, pathlib, os, signal\nfrom minillm.recipes.compare.claims import claim\n"
        f"with claim(pathlib.Path({str(tmp_path / 'lock')!r})) as mine:\n"
        "    print(mine, flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"True\n"
    with claim(tmp_path / "lock") as mine:
        assert not mine
    process.kill()
    process.communicate()
    with claim(tmp_path / "lock") as mine:
        assert mine


def test_the_same_call_does_nothing_again_and_more_may_be_asked_for(config, task, no_costs, tmp_path):
    folder = compare(config(seeds=1), task())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    compare(config(seeds=1), task())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == before
    compare(config(seeds=2, methods=("head", "lora", "ia3")), task())
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert {path: after[path] for path in before} == before
    assert {str(path.parent.relative_to(folder / "rows")) for path in after.keys() - before.keys()} == {
        "head/seed-2", "lora/seed-2", "ia3/choose-0.03", "ia3/choose-0.01", "ia3/seed-1", "ia3/seed-2", "ia3/costs",
    }  # fmt: skip


def test_what_another_process_did_meanwhile_is_not_done_again(tmp_path):
    """Between listing what is to be done and claiming it."""
    row = ROWS["lora"]
    study = Study(tmp_path, {"task": "x"}, [row], rates=1, seeds=1)
    study.describe_row(row, {"title": "LoRA", "rates": [1e-3]}, lambda: "")
    (report, costs), done = study.jobs(), []

    def execute(job, folder):
        done.append(job)
        return {}

    assert study._attempt(report, execute) and not study._attempt(report, execute)
    assert done == [report] and study.result(report) == {"row": "lora", "stage": "report"}
    with claim(tmp_path / "locks" / "lora-costs") as mine:
        assert mine and not study._attempt(costs, execute)
    assert study._attempt(costs, execute) and done == [report, costs]


def test_two_studies_in_one_folder(config, task, no_costs, bases):
    compare(config(seeds=1), task())
    for changes, other, named in (
        ({"steps": 5}, task(), "config.steps: 5 now, 4 then"),
        ({"rates": 1}, task(), "config.rates: 1 now, 2 then"),
        ({}, task(seed=1), "task_sha256: "),
        ({"kind": "decoder"}, task(), "base: "),
        ({"metric": "macro_f1"}, task(), "metrics: "),
    ):
        with pytest.raises(ValueError, match=f"holds another study, and its runs could not be compared(.|\n)*{named}"):
            compare(config(seeds=1, **changes), other)


def test_a_row_that_has_changed_is_another(config, task, no_costs, monkeypatch):
    compare(config(seeds=1), task())
    monkeypatch.setitem(ROWS, "lora", dataclasses.replace(ROWS["lora"], rates=(1e-2, 1e-3, 1e-4)))
    with pytest.raises(ValueError, match=r"holds another row 'lora'(.|\n)*rates: .0.01, 0.001. now"):
        compare(config(seeds=1), task())


def test_a_folder_with_something_else_is_left_alone(config, task, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"recipe": "tune"}))
    with pytest.raises(ValueError, match="already holds a run"):
        compare(config(run=str(run)), task())
    assert [path.name for path in run.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; choose another folder"):
        compare(config(run=str(tmp_path / "file")), task())
