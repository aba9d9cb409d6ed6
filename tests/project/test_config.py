"""Configs: to and from JSON, overrides, and one error that lists everything wrong."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

from minillm.config import from_dict, nearest, override, to_dict


@dataclass(frozen=True)
class Train:
    lr: float = 1e-3
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear"] = "cosine"
    compile: bool = False

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must be at least 0, got {self.lr}")


@dataclass(frozen=True)
class Lora:
    rank: int
    targets: tuple[str, ...] = ("q_proj",)
    ranks: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Run:
    run: str = "runs/x"
    seed: int | None = None
    train: Train = Train()
    lora: Lora | None = None


def test_config_survives_json():
    config = Run(seed=3, train=Train(lr=0.1, betas=(0.5, 0.6)), lora=Lora(4, ("a", "b")))
    assert from_dict(Run, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "assignment, read, expected",
    [
        ("train.lr=1e-3", lambda c: c.train.lr, 1e-3),
        ("train.lr=3", lambda c: c.train.lr, 3.0),
        ("train.steps=2e3", lambda c: c.train.steps, 2000),
        ("train.steps=10_000", lambda c: c.train.steps, 10_000),
        ("train.compile=True", lambda c: c.train.compile, True),
        ("train.compile=false", lambda c: c.train.compile, False),
        ("train.betas=0.8, 0.9", lambda c: c.train.betas, (0.8, 0.9)),
        ("train.schedule=linear", lambda c: c.train.schedule, "linear"),
        ("seed=7", lambda c: c.seed, 7),
        ("seed=none", lambda c: c.seed, None),
        ("run=a=b", lambda c: c.run, "a=b"),
        ("run=12", lambda c: c.run, "12"),
        ("train.betas=[0.8, 0.9]", lambda c: c.train.betas, (0.8, 0.9)),
        ("lora.rank=8", lambda c: c.lora, Lora(8)),  # an absent section starts from its defaults
    ],
)
def test_override_reads_the_value_as_its_field_says(assignment, read, expected):
    value = read(override(Run(), [assignment]))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("targets=a, b,", ("a", "b")),
        ("targets=", ()),
        ('targets=[" a", "b,c"]', (" a", "b,c")),
        ("targets=[END]", ("[END]",)),  # no JSON
        ("ranks=q_proj:4, mlp.up_proj : 8", (("q_proj", 4), ("mlp.up_proj", 8))),
        ("ranks=a:b:4", (("a:b", 4),)),
        ('ranks=[["q_proj", 4]]', (("q_proj", 4),)),
    ],
)
def test_tuples_as_text(text, expected):
    changed = override(Lora(1), [text])
    assert getattr(changed, text.partition("=")[0]) == expected
    assert from_dict(Lora, json.loads(json.dumps(to_dict(changed)))) == changed


def test_override_changes_nothing_else_and_not_the_original():
    config = Run(seed=1, lora=Lora(2))
    changed = override(config, ["lora.targets=k_proj,v_proj"])
    assert changed == Run(seed=1, lora=Lora(2, ("k_proj", "v_proj")))
    assert config.lora.targets == ("q_proj",)
    assert override(config, ["lora=none"]).lora is None


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("train.lrr=1", r"^train\.lrr: Train has no 'lrr'; did you mean lr\?$"),
        ("lr=1", r"^lr: Run has no 'lr'; did you mean train\.lr\?$"),
        ("trian.lr=1", r"^trian\.lr: Run has no 'trian\.lr'; did you mean train\.lr"),
        ("zzz=1", r"did you mean one of run, seed, train, train\.lr,"),
        ("train.lr.x=1", r"Run has no 'train\.lr\.x'; did you mean train\.lr"),
        ("train=1", r"^train: is a section; set one of train\.lr, train\.steps"),
        ("seed", r"^seed: expected section\.key=value"),
        ("train.lr=fast", r"^train\.lr: expected a number, got 'fast'$"),
        ("train.steps=1.5", r"^train\.steps: expected a whole number, got '1\.5'$"),
        ("train.compile=1", r"^train\.compile: expected true or false, got '1'$"),
        ("train.schedule=step", r"^train\.schedule: expected one of cosine, linear, got 'step'$"),
        ("train.betas=0.9", r"^train\.betas: expected 2 values, each a number, got \[0\.9\]$"),
        ("lora.ranks=q_proj", r"lora\.ranks\[0\]: expected text:a whole number, got \['q_proj'\]"),
        ("lora.ranks=q_proj:x", r"lora\.ranks\[0\]\[1\]: expected a whole number, got 'x'"),
        ("lora.targets=[1]", r"lora\.targets\[0\]: expected text, got 1"),
        ("train.lr=-1", r"^train: lr must be at least 0, got -1\.0$"),
        ("lora.targets=q", r"^lora\.rank: is missing; Lora needs it$"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(Run(), [assignment])


def test_override_lists_every_mistake_at_once():
    with pytest.raises(ValueError) as error:
        override(Run(), ["train.lrr=1", "sed=3", "run=fine", "seed"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["train.lrr", "sed", "seed"]


def test_from_dict_lists_every_mistake_at_once():
    data = {"runn": "x", "seed": True, "train": {"lr": "a", "stepz": 1}, "lora": {"targets": ["q", 3]}}
    with pytest.raises(ValueError) as error:
        from_dict(Run, data, "config.json: ")
    assert str(error.value).splitlines() == [
        "config.json: runn: Run has no 'runn'; did you mean run?",
        "config.json: seed: expected a whole number or none, got True",
        "config.json: train.stepz: Train has no 'stepz'; did you mean steps?",
        "config.json: train.lr: expected a number, got 'a'",
        "config.json: lora.rank: is missing; Lora needs it",
        "config.json: lora.targets[1]: expected text, got 3",
    ]


def test_from_dict_refuses_what_is_not_a_dict():
    with pytest.raises(ValueError, match="config: expected the keys of Run, got 'runs/x'"):
        from_dict(Run, "runs/x")


def test_to_dict_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError, match=r"a config holds numbers, text.* not \{1, 2\}"):
        to_dict(Run(run={1, 2}))


def test_nearest_prefers_the_last_segment_and_falls_back_to_all():
    assert nearest("lr", ["train.lr", "lora", "run"]) == "train.lr"
    assert nearest("hiden_size", ["hidden_size", "num_layers"]) == "hidden_size"
    assert nearest("qqq", ["a", "b"]) == "one of a, b"
    assert nearest("qqq", "abcdefghij") == "one of a, b, c, d, e, f, g, h and 2 more"
