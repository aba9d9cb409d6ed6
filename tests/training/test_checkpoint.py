import errno
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minillm.training import EarlyStopping, Evaluate, Interrupted, Loss, checkpoint, list_checkpoints, load_checkpoint

FILES = ("model.safetensors", "optimizer.pt", "random.pt", "state.json")


@pytest.fixture
def noisy_loss(toy_loss):
    """Draws from every generator a training step may draw from."""

    def loss_fn(model, batch):
        loss = toy_loss(model, batch)
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return Loss(loss.value * (1 + noise), loss.weight, {"noise": noise})

    return loss_fn


class StopAt(Evaluate):
    """Ends `fit` from outside, as an unplugged machine would, right after a step."""

    def __init__(self, step):
        self.at = step

    def on_step(self, trainer, record):
        if record["step"] == self.at:
            raise InterruptedError("the plug")


@pytest.mark.parametrize("cut, start", [(1, 0), (2, 0), (3, 2), (5, 4)])
def test_resumed_is_bit_identical(make_trainer, noisy_loss, cut, start):
    """Dropout, batch statistics, all generators, a loader between its batches, accumulation, evaluations."""

    def evaluate():
        return Evaluate(lambda model: {"loss": float(model.lm_head.weight.square().mean()), "noise": random.random()})

    def options():
        return {"dropout": 0.5, "loss_fn": noisy_loss, "accumulate": 2, "eval_every": 2}

    whole = make_trainer("whole", callbacks=[evaluate(), EarlyStopping()], **options())
    whole.fit()
    with pytest.raises(InterruptedError):
        make_trainer("cut", callbacks=[StopAt(cut), evaluate(), EarlyStopping()], **options()).fit()
    random.seed(99), torch.manual_seed(99), np.random.seed(99)
    again = make_trainer("cut", callbacks=[evaluate(), EarlyStopping()], **options())
    if start:  # then what is trained comes from the checkpoint, not from the caller
        torch.nn.init.ones_(again.model.lm_head.weight)
    assert again.resume() == start
    again.fit()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.metrics.path.read_bytes() == whole.metrics.path.read_bytes()
    assert [t["step"] for t in again.timing.read()] == [1, 2, 3, 4, 5, 6]


def test_what_is_trainable_is_what_is_saved(make_trainer):
    trainer = make_trainer(steps=2)
    trainer.fit()
    folder = list_checkpoints(trainer.run_dir)[2]
    assert load_file(folder / "model.safetensors").keys() == trainer.model.state_dict().keys() - {
        "frozen.weight",
        "frozen.bias",
    }
    for name in ("optimizer.pt", "random.pt"):
        torch.load(folder / name, weights_only=True)  # refuses anything that could run code


def test_keeps_the_newest(make_trainer):
    trainer = make_trainer(steps=7, save_every=2, keep_checkpoints=3)
    (trainer.run_dir / "checkpoints" / ".step-000002.killed").mkdir(parents=True)
    trainer._resumed = True
    trainer.fit()
    assert sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
        "step-000007",
    ]


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(keep_checkpoints=3)
    trainer.fit()
    return list_checkpoints(trainer.run_dir)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit(make_trainer, trained, name):
    path = trained[6] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"step-000006 is damaged:\n  {name} has changed: its SHA-256 is") as error:
        make_trainer(keep_checkpoints=3).resume()
    assert str(error.value).endswith("resume, to go on from there (in Python also: resume(step=4))")


@pytest.mark.parametrize("name", FILES)
def test_truncated(make_trainer, trained, name):
    size = (trained[6] / name).stat().st_size
    with open(trained[6] / name, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ValueError, match=rf"{name} has {size - 1} bytes; {size} were written\nstep 4's is whole"):
        make_trainer(keep_checkpoints=3).resume()


def test_missing_files(make_trainer, trained):
    (trained[6] / "optimizer.pt").unlink()
    (trained[4] / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"optimizer.pt is missing\nstep 2's is whole"):
        make_trainer(keep_checkpoints=3).resume()
    with pytest.raises(ValueError, match=r"step-000004 is damaged:\n  checksums.json cannot be used"):
        make_trainer(keep_checkpoints=3).resume(step=4)
    (trained[2] / "state.json").unlink()
    with pytest.raises(ValueError, match="no earlier one is whole: start the run anew in another folder"):
        make_trainer(keep_checkpoints=3).resume()


def test_going_on_from_the_previous_one(make_trainer, trained):
    whole = (trained[6].parents[1] / "metrics.jsonl").read_bytes()
    (trained[6] / "random.pt").write_bytes(b"")
    again = make_trainer(keep_checkpoints=3)
    assert again.resume(step=4) == 4
    assert list(list_checkpoints(again.run_dir)) == [2, 4]  # the damaged one, whose future will be written again
    assert [r["step"] for r in again.metrics.read()] == [1, 2, 3, 4]
    again.fit()
    assert again.metrics.path.read_bytes() == whole


def test_records_that_are_gone(make_trainer, trained):
    path = trained[6].parents[1] / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:4]))
    with pytest.raises(ValueError, match=r"metrics.jsonl holds 4 records up to step 6, and 6 were written: put back"):
        make_trainer(keep_checkpoints=3).resume()
    trainer = make_trainer(keep_checkpoints=3)
    assert trainer.resume(step=4) == 4  # the file has all of its records
    trainer.fit()
    assert path.read_text() == "".join(whole)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"line 1 is no record with a \"step\": '\{\"loss\": 1\}'"):
        make_trainer().resume()


def test_checkpoints_that_are_gone(make_trainer, trained):
    shutil.rmtree(trained[6].parent)
    with pytest.raises(ValueError, match=r"metrics.jsonl reaches step 6, .* every 2 steps.* has none: put") as error:
        make_trainer().resume()
    assert "delete metrics.jsonl to begin this one again from step 0" in str(error.value)
    assert len(make_trainer().metrics.read()) == 6
    (trained[6].parents[1] / "metrics.jsonl").unlink()
    assert make_trainer().resume() == 0
    early = make_trainer("early", steps=3, save_every=0)
    early.metrics.write({"step": 1, "loss": 1.0})  # killed before the first checkpoint
    assert make_trainer("early", steps=3, save_every=2).resume() == 0


@pytest.mark.parametrize("content", [b"{oops\n", b'{"step": "x"}\n', b"\xff\xfe\n", b"7\n"])
def test_broken_times_are_set_aside(make_trainer, trained, content):
    run = trained[6].parents[1]
    (run / "timing.jsonl").write_bytes(content)
    with pytest.warns(UserWarning, match=r"timing.jsonl, line 1 is .*; it is kept as timing.jsonl.damaged"):
        assert make_trainer().resume() == 6
    assert (run / "timing.jsonl.damaged").read_bytes() == content and not (run / "timing.jsonl").exists()


def test_no_such_step(make_trainer, trained):
    with pytest.raises(ValueError, match=r"has no checkpoint of step 3; it has those of \[2, 4, 6\]"):
        make_trainer().resume(step=3)


def test_finished_run_has_nothing_to_do(make_trainer, trained):
    before = trained[6].stat().st_mtime_ns
    trainer = make_trainer()
    assert trainer.resume() == 6
    assert trainer.fit() == {}
    assert trained[6].stat().st_mtime_ns == before


def test_longer_run_goes_on(make_trainer, trained):
    trainer = make_trainer(steps=8)
    trainer.resume()
    assert trainer.fit()["step"] == 8


def test_another_version(make_trainer, trained):
    state = json.loads((trained[6] / "state.json").read_text())
    (trained[6] / "state.json").write_text(json.dumps(state | {"format_version": 3}))
    sums = {name: checkpoint._fingerprint(trained[6] / name) for name in FILES}
    (trained[6] / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(
        ValueError, match="has checkpoint format version 3 and this minillm reads version 2: continue with"
    ):
        make_trainer().resume()


def test_another_run_is_told_all_differences(make_trainer, toy, trained):
    model = toy()
    model.frozen.requires_grad_(True)
    model.lm_head = torch.nn.Linear(16, 14)
    model.norm.requires_grad_(False)
    other = make_trainer(
        model=model,
        lr=0.02,
        steps=5,
        accumulate=3,
        log_every=7,
        identity={"tokenizer": "abc"},
        callbacks=[EarlyStopping()],
    )
    with pytest.raises(ValueError) as error:
        other.resume()
    message = str(error.value)
    assert message.startswith("this is not the run that saved the checkpoint of step 6:")
    for line in (
        "config: lr: 0.02 now, 0.01 then",
        "config: accumulate: 3 now, 1 then",
        "config: steps: 5 now, but 6 are done",
        "tokenizer: 'abc' now, None then",
        "callbacks that keep a state: ['EarlyStopping'] now, [] then",
        "frozen.weight: (8, 8) now, 'not trained' then",
        "lm_head.weight: (14, 16) now, (13, 16) then",
        "norm.bias: 'not trained' now, (16,) then",
    ):
        assert f"\n  {line}\n" in message
    assert "log_every: 7" not in message
    assert "(only steps, device, compile" in message


@pytest.mark.parametrize(
    "module, function, failure",
    [
        (
            "minillm.training.checkpoint",
            "save_file",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        ("torch", "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
        ("minillm.training.checkpoint", "write_json", OSError(errno.ENOSPC, "No space left on device")),
        ("minillm.files.os", "replace", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_disk_full(make_trainer, monkeypatch, module, function, failure):
    """What safetensors, torch and Python raise on a full disk (seen on a 1 MB tmpfs), at four stages of saving."""

    def fail(*args, **kwargs):
        raise failure

    class Fill(Evaluate):
        def __init__(self):
            pass

        def on_step(self, trainer, record):
            if record["step"] == 3:
                monkeypatch.setattr(f"{module}.{function}", fail)

    with pytest.raises(
        OSError, match=r"the checkpoint of step 4 could not be saved in .*checkpoints, where [\d,.]+ MB are"
    ) as e:
        make_trainer(callbacks=[Fill()]).fit()
    assert (getattr(failure, "strerror", None) or str(failure)) in str(e.value) and "the newest checkpoint is" in str(
        e.value
    )
    assert str(e.value).endswith("step-000002. If the disk is full, make room")
    monkeypatch.undo()
    again = make_trainer()
    assert sorted(p.name for p in (again.run_dir / "checkpoints").iterdir()) == ["step-000002"]
    assert again.resume() == 2
    assert again.fit()["step"] == 6


def test_identity_survives_json(make_trainer):
    """A tuple is a list in JSON, and a whole-number key text; neither is a difference."""
    make_trainer(identity={"targets": ("q_proj", "v_proj"), "counts": {1: 2}}).fit()
    assert make_trainer(identity={"targets": ("q_proj", "v_proj"), "counts": {1: 2}}).resume() == 6


def test_no_checkpoint_yet(tmp_path):
    assert load_checkpoint(tmp_path) is None and list_checkpoints(tmp_path) == {}


def test_two_stopping_rules_keep_their_own_state(make_trainer):
    def rules():
        return [EarlyStopping("a"), EarlyStopping("b")]

    def evaluate(model):
        return {"a": 5.0, "b": 7.0}

    make_trainer(callbacks=[Evaluate(evaluate), *rules()], eval_every=2).fit()
    later = rules()
    make_trainer(callbacks=[Evaluate(evaluate), *later], eval_every=2).resume()
    assert [(rule.best, rule.waited) for rule in later] == [(5.0, 2), (7.0, 2)]


def test_interrupted_is_an_exit():
    assert issubclass(Interrupted, SystemExit) and Interrupted(2, "stopped").code == 130


def test_other_peoples_hidden_files_are_left_alone(make_trainer):
    """Finder puts a .DS_Store into every folder it shows."""
    trainer = make_trainer(save_every=1, keep_checkpoints=1)
    (trainer.run_dir / "checkpoints" / ".notes").mkdir(parents=True)
    (trainer.run_dir / "checkpoints" / ".DS_Store").write_text("")
    (trainer.run_dir / "checkpoints" / ".step-000001.half").mkdir()
    trainer.resume()
    trainer.fit()
    assert sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir()) == [".DS_Store", ".notes", "step-000006"]
