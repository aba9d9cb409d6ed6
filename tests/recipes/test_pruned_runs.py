"""`minillm tune method=pruned_bitfit`: the run scores the biases, keeps some entries, and trains these."""

import os
import signal

import pytest
import torch

from minillm.data import PaddedLoader, TokenFile
from minillm.files import read_json
from minillm.models import load_model
from minillm.peft import BiasScores, BitFitConfig, tune, tunings_of
from minillm.recipes import prune
from minillm.recipes import tune as tune_recipe
from minillm.recipes.locate import load
from minillm.training import ProgressBar, causal_lm_loss

SCORED = ("method=pruned_bitfit", "pruned_bitfit.create_missing=true", "pruned_bitfit.score_steps=4")
TOTAL = 2 * (4 * 16 + 2 * 64 + 16)  # biases of a block's linear layers; the tiny base has none, and RMSNorms


@pytest.fixture
def tuned(cli, base, texts, tune_sizes, tmp_path):
    """`tuned(name, *words)` -> (run folder, code, what was printed, what was said on stderr)"""

    def call(name, *words):
        run = tmp_path / name
        more = (*tune_sizes, "train.clip=0.02", *SCORED, *words)
        return run, *cli("tune", f"base={base}", f"data.train={texts / 'notes.jsonl'}", f"run={run}", *more)

    return call


def by_hand(run, base, steps, keep):
    """The entries that torch's own AdamW, the run's data and the definition of the scores give."""
    model = load_model(base / "model").train()
    tune(model, BitFitConfig(create_missing=True))
    scores, own = BiasScores(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    loader = PaddedLoader(TokenFile.open(run / "data" / "train"), 4, 40, 0)
    torch.manual_seed(0)  # the base drops out
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        causal_lm_loss(model, next(loader)).value.backward()
        scores.update()
        torch.nn.utils.clip_grad_norm_(own, 0.02)
        for group in optimizer.param_groups:
            group["lr"] = prune.lr_at(step, prune.dataclasses.replace(TRAIN, steps=steps))
        optimizer.step()
    return scores, dict(scores.keep_entries(keep).kept)


TRAIN = prune.TrainConfig(lr=0.01, weight_decay=0.0)


def test_the_kept_entries_are_those_of_the_scores(tuned, base):
    run, code, out, err = tuned("run", "pruned_bitfit.keep=0.3")
    assert code == 0, err
    found, (scores, kept) = read_json(run / "kept.json"), by_hand(run, base, 4, 0.3)
    assert {name: tuple(places) for name, places in found["kept"].items()} == kept
    assert found["scores"] == pytest.approx(scores.vectors, rel=1e-4)
    count = sum(map(len, kept.values()))
    total = sum(len(entries) for entries in scores.entries.values())
    assert found["entries"] == total and count == round(0.3 * total)
    assert f"{count:,} of {total:,} entries of biases are kept" in out and "scoring biases" in err


def test_only_the_kept_entries_are_trained_and_saved(tuned, base, cli):
    run, code, _, err = tuned("run")
    assert code == 0, err
    report, kept = read_json(run / "report.json"), read_json(run / "kept.json")["kept"]
    assert report["method"] == "pruned_bitfit" and report["trainable"] == sum(map(len, kept.values()))
    model, _, tuned_report, _ = load(run)
    assert tuned_report.trainable == report["trainable"]
    assert dict(tunings_of(model)["default"].config.kept) == {name: tuple(places) for name, places in kept.items()}
    assert all(value.any() for value in tunings_of(model)["default"].parameters().values())
    held_out = report["held_out"]["new text"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    assert cli("generate", run, "the cat", "max_new_tokens=4")[0] == 0


class Stop(ProgressBar):
    """Sends this process a signal when step 3 is done; training ends there."""

    def on_step(self, trainer, record):
        super().on_step(trainer, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_goes_on_exactly_and_scores_nothing_again(tuned, cli, monkeypatch):
    whole, code, _, err = tuned("whole", "train.steps=6")
    assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setattr(tune_recipe, "ProgressBar", Stop)
        run, code, _, err = tuned("run", "train.steps=6")
    assert code == 130, err
    kept = (run / "kept.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(prune, "_score", None)
        code, _, err = cli("tune", f"run={run}", "--resume")
    assert code == 0, err
    for name in ("metrics.jsonl", "kept.json", "adapter/adapter_model.safetensors", "adapter/minillm.json"):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    assert (run / "kept.json").read_bytes() == kept

    code, _, err = cli("tune", f"run={run}", "--resume", "pruned_bitfit.keep=0.5")
    assert code == 2 and "pruned_bitfit.keep: 0.5 now, 0.25 then" in err
    (run / "kept.json").write_bytes(kept.replace(b'"kept"', b'"others"'))
    code, _, err = cli("tune", f"run={run}", "--resume")
    assert code == 2 and "kept.json: expected the kept entries of each bias" in err


def test_stopped_while_scoring_it_leaves_nothing(tuned, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BiasScores, "update", interrupted)
        run, code, _, err = tuned("run")
    assert code == 130 and not run.exists(), err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pruned_bitfit.keep=0",), "pruned_bitfit: keep=0.0: a share above 0, at most 1"),
        (("pruned_bitfit.keep=1.5",), "keep=1.5: a share above 0, at most 1"),
        (("pruned_bitfit.score_steps=1",), "score_steps=1: at least 2"),
        (("pruned_bitfit.biases=",), "biases: "),
        (("pruned_bitfit.biases=nowhere",), "nowhere"),
        (("pruned_bitfit.create_missing=false",), "it has no biases; create_missing=True gives its linear layers"),
        (("method=bitfit",), "method=bitfit uses no key of pruned_bitfit"),
        (("pruned_bitfit.kept=a",), "PruneConfig has no 'kept'; did you mean"),
    ],
)
def test_what_cannot_be_scored(words, expected, tuned):
    run, code, _, err = tuned("run", *words)
    assert code == 2 and expected in err and not run.exists(), err
