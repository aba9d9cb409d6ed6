import json
import sys

import pytest
import torch

from minillm.training import Records, create_run_folder, read_run_config
from minillm.training.run_folder import git_commit


def test_config_comes_back(tmp_path):
    folder = create_run_folder(tmp_path / "runs" / "a", {"train": {"steps": 3}})
    assert read_run_config(folder) == {"train": {"steps": 3}}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["python"] == sys.version.split()[0] and environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads() and environment["cpus"] >= 1
    assert {"minillm", "numpy", "platform", "gpus", "commit"} <= environment.keys()


@pytest.mark.parametrize("part", ["config.json", "metrics.jsonl", "checkpoints"])
def test_a_used_folder_is_refused(tmp_path, part):
    (tmp_path / part).mkdir()
    with pytest.raises(
        ValueError,
        match=rf"already holds a run \({part}\): continue it where its command has --resume .* choose another",
    ):
        create_run_folder(tmp_path, {})


def test_other_files_do_not_make_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    create_run_folder(tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"format_version": 7}', "{}", "[1]"])
def test_config_of_another_version(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config.json has format version (7|None) and this minillm reads version 1: use the"
    ):
        read_run_config(tmp_path)


def test_records_cut_and_torn(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    assert records.read() == []
    for step in (1, 2, 3):
        records.write({"step": step, "loss": 0.1 + 0.2, "č": float("inf")})
    whole = records.path.read_bytes()
    with open(records.path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    assert [record["step"] for record in records.read()] == [1, 2, 3]
    records.cut(3)
    assert records.path.read_bytes() == whole
    records.cut(1)
    assert records.path.read_bytes() == whole[: len(whole) // 3]


def test_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON: Expecting value: '\{\"step\": '"):
        Records(tmp_path / "metrics.jsonl").read()


@pytest.mark.parametrize(
    "head, packed", [("ref: refs/heads/main", False), ("ref: refs/heads/main", True), ("c0ffee", False)]
)
def test_commit_is_read_without_git(tmp_path, head, packed):
    assert git_commit(tmp_path) is None
    folder = tmp_path / ".git" / "refs" / "heads"
    folder.mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text(head + "\n")
    if packed:
        (tmp_path / ".git" / "packed-refs").write_text("# pack-refs\nc0ffee refs/heads/main\nbad refs/heads/main2\n")
    else:
        (folder / "main").write_text("c0ffee\n")
    assert git_commit(tmp_path) == "c0ffee"
