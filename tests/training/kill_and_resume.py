"""Kill a run again and again at random moments with SIGKILL, resume it, and compare it with one that was left alone.

    python tests/training/kill_and_resume.py --kills 20

Both must end in the same bits: weights, position of loader and callbacks, metrics.jsonl. Each attempt is a process of
its own, forked from this one, which has imported torch (that takes longer than the run) but never computes itself.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import tiny_run
import torch._dynamo  # noqa: F401  the first optimizer of a process imports it, for longer than the run lasts

from minillm.training import Records, list_checkpoints


def attempt(data: Path, run: Path, steps: int, kill_after: float | None) -> bool:
    """Train in a child process, resuming what there is; kill it after so many seconds. Whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            tiny_run.train(data, run, steps=steps, resume=(run / "config.json").exists())
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # a finished child is still there to be killed until it is waited for
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("a resumed run failed")
    return os.WIFSIGNALED(status)


def endstate(run: Path) -> dict[str, bytes]:
    last = max((run / "checkpoints").glob("step-*"))
    return {p.name: p.read_bytes() for p in (last / "model.safetensors", last / "state.json", run / "metrics.jsonl")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments, kills, runs, resumable, saving, reached = random.Random(args.seed), 0, 0, 0, 0, set()
    with tempfile.TemporaryDirectory() as folder:
        data, whole = Path(folder, "data"), Path(folder, "whole")
        tiny_run.write_data(data)
        start = time.perf_counter()
        attempt(data, whole, args.steps, None)
        seconds = time.perf_counter() - start
        while kills < args.kills:
            run, runs = Path(folder, "killed"), runs + 1
            killed = True
            while killed:
                wait = moments.uniform(0, 0.6 * seconds) if kills < args.kills else None
                killed = attempt(data, run, args.steps, wait)
                if killed:
                    kills += 1
                    resumable += bool(list_checkpoints(run))
                    saving += any((run / "checkpoints").glob(".*"))
                    reached.add(len(Records(run / "metrics.jsonl").read()))
            if different := [name for name, content in endstate(whole).items() if endstate(run)[name] != content]:
                raise SystemExit(f"after {kills} kills the run ended in another {' and '.join(different)}")
            shutil.rmtree(run)
    if not resumable:
        raise SystemExit("no run was killed after its first checkpoint, so nothing was resumed: the test shows nothing")
    print(
        f"{kills} kills in {runs} runs of {args.steps} steps, {resumable} after the first checkpoint, {saving} while "
        f"saving, at {len(reached)} different lengths of metrics.jsonl: all ended in the same bits"
    )


if __name__ == "__main__":
    main()
