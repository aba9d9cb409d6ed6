import pytest
import torch

from minillm.training import Callback, EarlyStopping, Evaluate, ProgressBar


def scripted(losses):
    """An evaluation that gives these losses one after the other."""
    losses = iter(losses)
    return Evaluate(lambda model: {"loss": next(losses)}, name="held_out")


def test_evaluates_without_gradients_in_eval_mode(make_trainer):
    seen = []

    def function(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"loss": 1.5}

    trainer = make_trainer(callbacks=[Evaluate(function)], steps=5, eval_every=2)
    trainer.fit()
    assert seen == [(False, False)] * 3
    found = [(r["step"], r["eval"]) for r in trainer.metrics.read() if "eval" in r]
    assert found == [(2, {"loss": 1.5}), (4, {"loss": 1.5}), (5, {"loss": 1.5})]


def test_never_but_at_the_end(make_trainer):
    trainer = make_trainer(callbacks=[scripted([1.0])], eval_every=0, save_every=0)
    trainer.fit()
    assert [r["step"] for r in trainer.metrics.read() if "held_out" in r] == [6]
    assert [p.name for p in (trainer.run_dir / "checkpoints").iterdir()] == ["step-000006"]


@pytest.mark.parametrize(
    "losses, patience, last",
    [
        ([5, 4, 3, 2, 1, 0], 1, 6),
        ([5, 4, 4, 3, 2, 1], 1, 3),  # equal is not better
        ([5, 6, 4, 5, 6, 7], 2, 5),  # an improvement starts the count anew
        ([5, float("nan"), 4, 3, 2, 1], 1, 2),
        ([5, 6, 7, 8, 9, 10], 0, 6),  # 0: never
    ],
)
def test_early_stopping(make_trainer, losses, patience, last):
    stopping = EarlyStopping(name="held_out")
    trainer = make_trainer(callbacks=[scripted(losses), stopping], eval_every=1, patience=patience)
    assert trainer.fit()["step"] == last
    assert trainer.stopped == (
        "" if last == 6 else f"{patience} evaluations without a held_out loss below {stopping.best:.4f}"
    )
    again = make_trainer(callbacks=[scripted([]), EarlyStopping(name="held_out")], eval_every=1, patience=patience)
    assert again.resume() == last  # the end was saved, whatever save_every says
    assert again.fit() == {}  # and a stopped run stays stopped


class Snapshots(Callback):
    """Copies of the weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step(self, trainer, record):
        self.after[record["step"]] = trainer.copy_weights()


def same(model, weights):
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return all(torch.equal(named[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("losses, patience, last, best", [([5, 4, 6, 7, 1, 1], 2, 4, 2), ([5, 4, 3, 3, 2, 4], 9, 6, 5)])
def test_the_best_weights_are_the_result(make_trainer, losses, patience, last, best):
    seen = Snapshots()
    stopping = EarlyStopping(name="held_out")
    trainer = make_trainer(callbacks=[seen, scripted(losses), stopping], eval_every=1, patience=patience)
    trainer.fit()
    assert (trainer.step, trainer.weights_step) == (last, best)
    assert same(trainer.model, seen.after[best]) and not same(trainer.model, seen.after[last])
    again = make_trainer(callbacks=[scripted([]), EarlyStopping(name="held_out")], eval_every=1, patience=patience)
    again.resume()
    assert same(again.model, seen.after[last])  # a longer run would go on from there
    again.fit()
    assert same(again.model, seen.after[best]) and again.weights_step == best


def test_best_weights_survive_an_interruption(make_trainer):
    """Step 2 is the best; the run stops with its state of step 4 saved, and goes on to the same end."""
    losses = [5, 2, 4, 4, 3, 3]

    def make(name, losses, *more):
        return make_trainer(name, callbacks=[scripted(losses), EarlyStopping(name="held_out"), *more], **options)

    class Stop(Callback):
        def on_step(self, trainer, record):
            if record["step"] == 5:
                raise KeyboardInterrupt

    options = {"eval_every": 1, "patience": 4, "save_every": 2, "dropout": 0.3}
    whole = make("whole", losses)
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        make("cut", losses, Stop()).fit()
    resumed = make("cut", losses[4:])
    assert resumed.resume() == 4
    resumed.fit()
    assert resumed.weights_step == whole.weights_step == 2
    assert same(resumed.model, whole.copy_weights())
    assert resumed.metrics.path.read_bytes() == whole.metrics.path.read_bytes()
    kept = whole.run_dir / "checkpoints" / "step-000006" / "callbacks.safetensors"
    kept.unlink()
    with pytest.raises(ValueError, match=r"callbacks\.safetensors is missing"):
        make("whole", []).resume()


def test_without_patience_nothing_is_kept(make_trainer):
    first = make_trainer(callbacks=[scripted([5, 1, 2]), EarlyStopping(name="held_out")], eval_every=1, steps=3)
    first.fit()
    assert first.weights_step == 3 and not list(first.run_dir.rglob("callbacks.safetensors"))
    later = make_trainer(
        callbacks=[scripted([3, 3]), EarlyStopping(name="held_out")], eval_every=1, steps=5, patience=9
    )
    later.resume()
    with pytest.warns(UserWarning, match=r"best held_out loss was 1\.0000 at step 2, when patience was 0 .* step 5"):
        later.fit()
    assert later.weights_step == 5


def test_early_stopping_on_what_is_not_measured(make_trainer):
    trainer = make_trainer(callbacks=[scripted([1.0]), EarlyStopping("perplexity", "held_out")], eval_every=1)
    with pytest.raises(ValueError, match="EarlyStopping watches 'perplexity', but held_out gives loss"):
        trainer.fit()


def test_progress_bar(make_trainer, capsys):
    make_trainer(callbacks=[ProgressBar("toy"), scripted([1.25, 1.25])], eval_every=3).fit()
    shown = capsys.readouterr().err
    assert "toy: 100%" in shown and "6/6" in shown and "loss " in shown and "tokens/s, held_out loss 1.250" in shown


def test_on_end_comes_in_whatever_way(make_trainer, toy_loss):
    events = []

    class Witness(Callback):
        def on_start(self, trainer):
            events.append("start")

        def on_end(self, trainer):
            events.append("end")

    def loss_fn(model, batch):
        raise InterruptedError

    make_trainer("a", callbacks=[Witness()], steps=1).fit()
    with pytest.raises(InterruptedError):
        make_trainer("b", callbacks=[Witness()], loss_fn=loss_fn).fit()
    assert events == ["start", "end"] * 2
