"""A process that works at a study: `python study_process.py FOLDER BASE LOG [KILLED_IN_RUN]`, as users start several.

Each run it does is a line of LOG. With a number it kills itself in the middle of that run, as a power cut would.
There is no `if __name__ == "__main__"` on purpose: what measures memory must not run this script again.
"""

import os
import signal
import sys

from tiny_tasks import make_task

from minillm.recipes.compare import CompareConfig, compare, costs, scoreboard, trial

folder, base, log, *killed = sys.argv[1:]
done = 0
run_trial, watch_step = scoreboard.run_trial, trial.Watch.on_step


def logged(problem, judge, row, rate, seed, place, held_out=None):
    global done
    done += 1
    with open(log, "a") as file:
        file.write(f"{place.parent.name}/{place.name}\n")
    return run_trial(problem, judge, row, rate, seed, place, held_out)


def dying(self, trainer, record):
    watch_step(self, trainer, record)
    if killed and done == int(killed[0]) and trainer.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)


scoreboard.run_trial, trial.Watch.on_step = logged, dying
costs.memory_added = lambda problem, row: 0
costs.overhead = lambda problem, row: {"unmerged": 1.0, "merged": None}
sizes = {"seeds": 2, "rates": 2, "steps": 4, "batch_size": 4, "length": 48, "points": 2}
compare(CompareConfig(base, "colours", ("head", "lora", "ia3"), run=folder, **sizes), make_task())
