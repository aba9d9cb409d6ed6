"""Runs as users start them: killed and resumed, and two processes under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.training import Records

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(*command) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tiny_run(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import tiny_run

    return tiny_run


@pytest.mark.slow
def test_three_kills():
    done = python(HERE / "kill_and_resume.py", "--kills", 3, "--steps", 16)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 kills in ") and "all ended in the same bits" in done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, tiny_run):
    """SIGTERM after step 3 ends a single process there. Of two it reaches only the second; the first learns of it in
    step 4, so both stop after that. They go on when started again.

    The same sums in another order, in float32: 1e-5 relative after 6 steps. Each batch has another number of labels.
    """
    data, alone, pair = tmp_path / "data", tmp_path / "alone", tmp_path / "pair"
    tiny_run.write_data(data)
    options = ("--steps", 6, "--dropout", 0)
    stopped = python(HERE / "tiny_run.py", data, alone, *options, "--sigterm", 0, 3)
    assert stopped.returncode == 143 and "SIGTERM: stopped after step 3, saved in" in stopped.stderr
    tiny_run.train(data, alone, steps=6, dropout=0.0, resume=True)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = (*torchrun, HERE / "tiny_run.py", data, pair, *options)
    stopped = python(*two, "--sigterm", 1, 3)
    assert stopped.returncode != 0 and "SIGTERM: stopped after step 4, saved in" in stopped.stderr
    assert Records(pair / "metrics.jsonl").read()[-1]["step"] == 4
    with pytest.raises(ValueError, match=r"processes \(torchrun --nproc_per_node\): 1 now, 2 then"):
        tiny_run.train(data, pair, steps=6, dropout=0.0, resume=True)
    resumed = python(*two, "--resume")
    assert resumed.returncode == 0, resumed.stderr

    expected, found = Records(alone / "metrics.jsonl").read(), Records(pair / "metrics.jsonl").read()
    assert [r["step"] for r in found] == [r["step"] for r in expected] == [1, 2, 3, 3, 4, 5, 6, 6]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.get("eval", ours) == pytest.approx(theirs.get("eval", theirs), rel=1e-5)
