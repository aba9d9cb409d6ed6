"""Tasks by name: what there is, what a user adds, and what is never run."""

import pytest

from minillm.data.tasks import TASKS, Rewrite, Task, load_task, register_task
from minillm.data.tasks.registry import Tasks

SPLITS = {split: (Rewrite(split, ("b",)),) for split in ("train", "valid", "test")}


@pytest.fixture
def mine(monkeypatch):
    """A registry that forgets after the test what was registered in it."""
    monkeypatch.setattr(TASKS, "_registered", {})


def make(seed: int = 0, size: int = 1) -> Task:
    return Task(f"mine {seed} {size}", "rewriting", SPLITS, ("chrf",))


def test_every_name_leads_to_its_function():
    for name, function in TASKS.items():
        assert callable(function) and function.__doc__.strip(), name
    assert "sentiment" in TASKS and len(TASKS) == len(list(TASKS)) >= 11


def test_a_file_is_imported_only_when_it_is_asked_for():
    lazy = Tasks({"a": "no.such.module.function", "b": "minillm.data.tasks.generated.nli.nli"})
    assert list(lazy) == ["a", "b"] and "a" in lazy and lazy["b"].__name__ == "nli"
    with pytest.raises(ModuleNotFoundError):
        lazy["a"]


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="there is no task 'sentimnet'; did you mean sentiment\\?"):
        load_task("sentimnet")
    with pytest.raises(KeyError, match="did you mean sentiment"):
        TASKS["sentimnet"]


def test_a_registered_task_is_called_with_seed_and_options(mine):
    register_task("my-task", make)
    assert load_task("my-task", seed=4, size=2).name == "mine 4 2" and "my-task" in list(TASKS)
    register_task("simple", lambda: make())
    assert load_task("simple", seed=3).name == "mine 0 1"
    with pytest.raises(ValueError, match=r"register_task\('my-task'\): there is such a task"):
        register_task("my-task", make)
    with pytest.raises(ValueError, match="so that it is no path; a function that makes the task is needed, not 3"):
        register_task("a/b", 3)
    register_task("wrong", lambda seed: "text")
    with pytest.raises(ValueError, match="the function of 'wrong' gave a str, not a Task"):
        load_task("wrong")


def test_options_that_there_are_not():
    with pytest.raises(ValueError, match=r"trian=3: there is no such option; did you mean train\?"):
        load_task("sentiment", trian=3)
    with pytest.raises(ValueError, match="folder='data': it is made without files"):
        load_task("sentiment", folder="data")
    with pytest.raises(ValueError, match=r"seed=1\.5: a whole number"):
        load_task("sentiment", seed=1.5)


def test_a_set_that_needs_a_folder_says_so(mine):
    def published(folder, fold: int = 0):
        return Task(f"{folder} {fold}", "rewriting", SPLITS, ("chrf",))

    register_task("published", published)
    assert load_task("published", folder="data", fold=3).name == "data 3"
    with pytest.raises(ValueError, match="the task 'published': folder is missing: where the files of the set lie"):
        load_task("published")


def test_a_name_is_never_run_as_code(tmp_path):
    (tmp_path / "task.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="loading runs no code; import your file and call register_task"):
        load_task(tmp_path / "task.py")


def test_a_task_goes_before_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nli").mkdir()
    assert load_task("nli", train=3, valid=3, test=3).name == "nli"
    with pytest.raises(ValueError, match="nli: no file for train"):
        load_task("./nli")
