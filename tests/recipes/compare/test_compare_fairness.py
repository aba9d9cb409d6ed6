"""Every method has the same conditions, and nothing is chosen by what is reported."""

import hashlib

import pytest
import torch

from minillm.data.tasks import Text
from minillm.files import read_json
from minillm.recipes.compare import ROWS, compare
from minillm.recipes.compare.problem import Problem

SOME = ("head", "full", "last-2", "bitfit", "houlsby", "lora", "increlora", "qlora", "prompt", "prefix")


def read(folder, pattern):
    return {str(path.parent.relative_to(folder / "rows")): read_json(path) for path in folder.glob(f"rows/{pattern}")}


def test_all_rows_see_the_same_batches_and_the_same_steps(config, task, no_costs):
    folder = compare(config(methods=SOME), task())
    for seed, name in ((0, "choose-*"), (1, "seed-1"), (2, "seed-2")):
        found = read(folder, f"*/{name}/result.json")
        assert len(found) == len(SOME) * (2 if seed == 0 else 1)
        assert {result["seed"] for result in found.values()} == {seed}
        assert len({result["data_sha256"] for result in found.values()}) == 1
        steps = [(folder / "rows" / run / "metrics.jsonl").read_text().count('"grad_norm"') for run in found]
        assert set(steps) == {4}
    hashes = {result["data_sha256"] for result in read(folder, "head/*/result.json").values() if "seed" in result}
    assert len(hashes) == 3  # another seed, another order


def test_the_hash_is_of_the_batches(config, task, no_costs, bases):
    """Computed again here, from the examples in the loader's order."""
    from minillm.recipes.compare.examples import make_problem
    from minillm.recipes.compare.find import find_base

    folder = compare(config(seeds=1, rates=1), task())
    problem, digest = make_problem(find_base(str(bases["encoder"]))[0], task(), config()), hashlib.sha256()
    loader = problem.loader(1)
    for _ in range(4):
        for name, values in sorted(next(loader).items()):
            digest.update(name.encode() + values.numpy().tobytes())
    assert read_json(folder / "rows/lora/seed-1/result.json")["data_sha256"] == digest.hexdigest()


class Poison:
    """A label that cannot be looked at."""

    def __repr__(self):
        return "poison"

    def __eq__(self, other):
        raise AssertionError("a label of test was looked at")

    __hash__ = None


def test_rates_are_chosen_without_a_look_at_test(config, task, no_costs, monkeypatch):
    """With poison for test's labels every rate is chosen as before, and only then the reported runs fail on it."""
    fine = compare(config(), task())
    poisoned = task()
    records = tuple(Text(record.text, 0) for record in poisoned["test"])
    for record in records:
        object.__setattr__(record, "label", Poison())
    object.__setattr__(poisoned, "splits", {**poisoned.splits, "test": records})
    asked = []
    monkeypatch.setattr(Problem, "records", _noting(Problem.records, asked))
    folder = compare(config(run=str(fine.parent / "poisoned")), poisoned)
    chosen = read(folder, "*/choose-*/result.json")
    assert len(chosen) == 4
    for run, result in chosen.items():
        assert (
            result["split"] == "valid"
            and result["metrics"] == read_json(fine / "rows" / run / "result.json")["metrics"]
        )
    reported = read(folder, "*/seed-*/result.json")
    assert len(reported) == 4 and all("reason" in result and "score" not in result for result in reported.values())
    assert "test" in asked


def test_test_is_not_read_before_a_rate_is_chosen(config, task, no_costs, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(Problem, "records", _noting(Problem.records, asked))
    import minillm.recipes.compare.scoreboard as scoreboard

    run_trial = scoreboard.run_trial

    def noting(problem, judge, row, rate, seed, folder, held_out=None):
        asked.clear()
        found = run_trial(problem, judge, row, rate, seed, folder, held_out)
        seen.append((folder.name, set(asked)))
        return found

    monkeypatch.setattr(scoreboard, "run_trial", noting)
    compare(config(), task())
    assert all("test" not in splits for name, splits in seen if name.startswith("choose"))
    assert all("test" in splits for name, splits in seen if name.startswith("seed"))
    assert sum(name.startswith("choose") for name, _ in seen) == 4


def _noting(method, asked):
    def records(self, split):
        asked.append(split)
        return method(self, split)

    return records


def test_the_rate_with_the_best_score_on_valid_is_chosen(config, task, no_costs, monkeypatch):
    """Scores by rate are given here: 1/3 of the rates' logarithm; a rate that fails, and equal ones, are minded."""
    import minillm.recipes.compare.scoreboard as scoreboard

    run_trial = scoreboard.run_trial
    scores = {1e-2: 0.5, 3e-3: 0.7, 3e-2: None, 1e-3: 0.6}

    def given(problem, judge, row, rate, seed, folder, held_out=None):
        if held_out is None and scores[rate] is None:
            raise ValueError("step 3: the loss is not finite (loss nan). The weights are still those of step 2")
        found = run_trial(problem, judge, row, rate, seed, folder, held_out)
        return found if held_out else found | {"score": scores[rate]}

    monkeypatch.setattr(scoreboard, "run_trial", given)
    folder = compare(config(rates=3, seeds=1), task())
    rows = {row["row"]: row for row in read_json(folder / "results.json")["rows"]}
    assert rows["head"]["rate"] == 3e-3 and rows["lora"]["rate"] == 3e-3
    assert (
        read_json(folder / "rows/head/choose-0.03/result.json")["reason"] == "step 3: the loss is not finite (loss nan)"
    )
    scores[1e-2] = 0.7  # as good as 3e-3: the likelier one, which stands first in the row
    folder = compare(config(rates=3, seeds=1, run=str(folder.parent / "second")), task())
    rows = {row["row"]: row for row in read_json(folder / "results.json")["rows"]}
    assert rows["head"]["rate"] == 1e-2 and rows["lora"]["rate"] == 3e-3


def test_every_row_has_as_many_rates_and_prompts_have_larger_ones():
    assert {len(set(row.rates)) for row in ROWS.values()} == {3}
    full = ROWS["full"].rates
    for name, factor in (("prompt", 10), ("prefix", 10), ("bitfit", 10), ("ia3", 10)):
        assert min(ROWS[name].rates) >= factor * min(full) and max(ROWS[name].rates) >= factor * max(full)


@pytest.mark.parametrize("name", ["head", "lora"])
def test_a_seed_decides_everything(name, config, task, no_costs, tmp_path):
    """Two studies of one config have the same predictions, whatever ran before."""
    one = compare(config(methods=(name,), seeds=1), task())
    torch.manual_seed(99)
    other = compare(config(methods=("ia3", name), seeds=1, run=str(tmp_path / "other")), task())
    for run in ("choose-0.003", "seed-1"):
        a, b = (read_json(f / "rows" / name / run / "result.json") for f in (one, other))
        assert (a["metrics"], a["curve"], a["data_sha256"]) == (b["metrics"], b["curve"], b["data_sha256"])
