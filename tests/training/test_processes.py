"""Runs as users start them: killed and resumed, and two processes under torchrun."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from minillm.training import Records, distributed

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


def test_an_error_in_the_main_process_reaches_the_others(monkeypatch):
    """As rank 1 sees it: the broadcast brings what rank 0 sent."""
    sent = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda values, src: sent.append(list(values)))
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    for failure in (ValueError("short of text"), OSError("short of disk"), KeyError("a bug")):
        with pytest.raises(type(failure)) as raised:
            distributed.from_main(lambda failure=failure: (_ for _ in ()).throw(failure))
        assert raised.value is failure
    assert distributed.from_main(lambda: 3) == 3
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    arriving = iter(list(sent))
    monkeypatch.setattr(
        distributed.dist, "broadcast_object_list", lambda values, src: values.__setitem__(0, next(arriving)[0])
    )
    for expected, message in ((ValueError, "short of text"), (ValueError, "short of disk"), (RuntimeError, "'a bug'")):
        with pytest.raises(expected, match=f"^{message}$"):
            distributed.from_main(lambda: pytest.fail("only the main process makes it"))
    assert distributed.from_main(lambda: 4) == 3


def test_the_others_wait_long_enough_for_the_main_process(monkeypatch):
    """Torch's own patience (10 or 30 minutes) is less than the tokenising of a large text may take."""
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **options: asked.update(options))
    monkeypatch.setattr(distributed, "_leave", lambda: None)
    with distributed.process_group("cpu"):
        assert asked["timeout"] >= timedelta(hours=12)


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
