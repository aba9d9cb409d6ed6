"""Ctrl-C (SIGINT) and a polite kill (SIGTERM) end a run after the step in progress, with its state saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


class Interrupted(SystemExit):
    """A signal ended training; the state is saved. Uncaught, it ends the process with the shell's 128 + signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(128 + signum)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


@dataclass
class Caught:
    """Which signal has come: 0 while none has."""

    signum: int = 0


@contextlib.contextmanager
def catch_signals() -> Iterator[Caught]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one acts as it did before.

    Python hands signals to the main thread only, so in another thread there is nothing to catch.
    """
    caught, before = Caught(), {}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum: int, _frame: object) -> None:
        caught.signum = signum
        restore()
        text = f"\n{signal.Signals(signum).name}: finishing this step and saving; once more stops at once\n"
        os.write(2, text.encode())  # print may not be called while another print is interrupted

    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()
