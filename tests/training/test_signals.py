import os
import signal
import threading

import pytest

from minillm.training import Callback, Interrupted
from minillm.training.signals import catch_signals


class Press(Callback):
    """Sends this process signals after some steps."""

    def __init__(self, signum, *steps):
        self.signum, self.steps = signum, steps

    def on_step(self, trainer, record):
        if record["step"] in self.steps:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_saves_and_exits(make_trainer, capfd, signum, code):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(
        Interrupted, match=rf"{signum.name}: stopped after step 3, saved in .*step-000003; resume to"
    ) as error:
        make_trainer(dropout=0.5, save_every=0, callbacks=[Press(signum, 3)]).fit()
    assert error.value.code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    shown = capfd.readouterr().err
    assert (
        f"{signum.name}: finishing this step and saving; once more stops at once" in shown and str(error.value) in shown
    )

    again, whole = make_trainer(dropout=0.5, save_every=0), make_trainer("whole", dropout=0.5, save_every=0)
    assert again.resume() == 3
    again.fit(), whole.fit()
    assert again.metrics.path.read_bytes() == whole.metrics.path.read_bytes()


@pytest.fixture
def heeding():
    """Ctrl-C interrupts, also where the tests run as a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_one_acts_as_before(heeding):
    with pytest.raises(KeyboardInterrupt), catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_catch_nothing(make_trainer):
    """Python allows handlers in the main thread only; training in another one, as some notebooks do, still works."""
    trainer, steps = make_trainer(steps=2), []
    thread = threading.Thread(target=lambda: steps.append(trainer.fit()["step"]))
    thread.start()
    thread.join()
    assert steps == [2]


def test_a_signal_in_the_last_step_is_not_lost(make_trainer):
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 6"):
        make_trainer(callbacks=[Press(signal.SIGTERM, 6)]).fit()
