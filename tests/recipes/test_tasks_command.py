"""`minillm tasks`: the list, a card with records, and files."""

import json

from minillm.data import read_documents
from minillm.data.tasks import TASKS, load_task


def test_the_list_has_every_task(cli):
    code, out, _ = cli("tasks")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.split("\n\n")[0].splitlines()[2:]}
    for name in TASKS:
        assert f"\n{name}: {TASKS[name].__doc__.strip().splitlines()[0]}" in out
        if name in rows:
            task = load_task(name)
            counting = "-" if task.counting is None else f"{task.counting:.2f}"
            assert rows[name] == [name, task.kind, "1000/250/500", task.score, f"{task.ceiling:.2f}", counting]
    assert {"sentiment", "nli", "qa"} <= rows.keys() and "recipes, ship-logs, contracts" in out


def test_a_card_and_ten_records(cli):
    task = load_task("sentiment")
    out = cli("tasks", "sentiment")[1]
    assert out.startswith("sentiment\n  kind     classification\n  records  1000/250/500 (train/valid/test)")
    assert out.count("\nlabel: ") == 10
    for record in task["train"][:10]:
        assert f"text: {record.text}\nlabel: {task.labels[record.label]}" in out
    tagged = cli("tasks", "pos", "--split", "test", "--count", "2", "--seed", "4")[1].split("\n\n")[1:]
    expected = load_task("pos", seed=4)
    assert [line.split()[0] for line in tagged] == [
        f"{r.words[0]}/{expected.labels[r.tags[0]]}" for r in expected["test"][:2]
    ]


def test_records_become_files(cli, tmp_path):
    code, out, _ = cli("tasks", "similarity", "--count", "1", "--save", tmp_path / "s")
    assert code == 0 and out.rstrip().endswith(f"written to {tmp_path / 's'}")
    assert cli("tasks", tmp_path / "s")[1].split("\n\n")[1] == out.split("\n\n")[1]
    assert json.loads((tmp_path / "s" / "train.jsonl").read_text().splitlines()[0]).keys() == {
        "text",
        "second",
        "label",
    }


def test_a_domain(cli, tmp_path):
    code, out, _ = cli("tasks", "recipes", "--count", "2", "--save", tmp_path / "r")
    assert code == 0 and out.startswith("recipes: 1000 documents to learn from, 100 held out")
    documents = read_documents(tmp_path / "r" / "train.jsonl")
    assert len(documents) == 1000 and documents[1].text in out
    assert len(read_documents(tmp_path / "r" / "held_out.jsonl")) == 100


def test_what_cannot_be(cli, tmp_path):
    for words, match in {
        ("sentimnt",): "did you mean sentiment",
        ("recipe",): "did you mean recipes",
        ("nli", "--count", "0"): "count=0: how many records to show",
        ("--save", "x"): "save: of which task? minillm tasks NAME",
        ("nli", "--folder", "x"): "folder='x': it is made without files",
        ("recipes", "--folder", "x"): "folder: recipes is made without files",
    }.items():
        code, _, err = cli("tasks", *words)
        assert code == 2 and match in err, (words, err)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("x")
    assert "holds files that would be lost" in cli("tasks", "nli", "--save", tmp_path / "s")[2]
