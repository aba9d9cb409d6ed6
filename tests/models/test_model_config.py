"""ModelConfig: what it refuses and says, and what survives JSON and the command line."""

import json
from dataclasses import dataclass, field

import pytest

from minillm.config import from_dict, override, to_dict
from minillm.models import ModelConfig
from minillm.ops import RopeScaling

REFUSED = [
    (dict(kind="decodr"), "kind='decodr': did you mean decoder"),
    (dict(positions="sinusoid"), "positions='sinusoid': did you mean sinusoidal"),
    (dict(attention_bias="qv"), "attention_bias='qv': did you mean qkv"),
    (dict(attention_dropout=1.0), r"attention_dropout=1.0: must be in \[0, 1\)"),
    (dict(attention_dropout=-0.1), r"attention_dropout=-0.1: must be in \[0, 1\)"),
    (dict(logit_scale=0.0), "logit_scale=0.0: must be a number above 0"),
    (dict(logit_scale=float("inf")), "logit_scale=inf: must be a number above 0"),
    (dict(token_types=-1), "token_types=-1: must be at least 0"),
    (dict(token_types=2), "token_types is for encoders, not kind='decoder'"),
    (dict(kind="encoder_decoder", token_types=2), "token_types is for encoders, not kind='encoder_decoder'"),
    (dict(num_decoder_layers=3), "num_decoder_layers is for encoder-decoders, not kind='decoder': give num_layers"),
    (dict(kind="encoder_decoder", num_decoder_layers=0), "num_decoder_layers=0: must be at least 1"),
    (dict(decoder_start_id=4096), r"decoder_start_id=4096 is outside the vocabulary 0..4095"),
    (dict(decoder_start_id=-1), r"decoder_start_id=-1 is outside the vocabulary 0..4095"),
    (dict(sliding_window=-1), "sliding_window=-1: must be at least 1, or 0 for a layer that sees all"),
    (dict(sliding_window=(4, -2, 0, 0)), r"sliding_window=\(4, -2, 0, 0\): must be at least 1"),
    (dict(sliding_window=(4, 0)), "sliding_window has 2 entries for num_layers=4"),
    (dict(sliding_window=()), "sliding_window has 0 entries for num_layers=4"),
    (dict(kind="encoder", sliding_window=4), "sliding_window is for decoders, not kind='encoder'"),
    (dict(positions="learned", rope_scaling=RopeScaling()), "rope_scaling is for positions='rope', not 'learned'"),
    (dict(relative_buckets=0), "relative_buckets=0: must be at least 1"),
    (dict(positions="relative", relative_buckets=1), "relative_buckets=1 must be at least 2"),
    (dict(positions="relative", kind="encoder", relative_buckets=3), "relative_buckets=3 must be at least 4"),
    (dict(positions="relative", relative_distance=16), "relative_distance=16 more than half of it"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_what_makes_no_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        ModelConfig(num_decoder_layers=2, token_types=1, positions="learned", rope_scaling=RopeScaling())
    for part in ("num_decoder_layers is for", "token_types is for", "rope_scaling is for"):
        assert part in str(error.value)


def test_what_is_left_open_follows_from_the_rest():
    assert ModelConfig(dropout=0.3).attention_dropout == 0.3
    assert ModelConfig(dropout=0.3, attention_dropout=0.0).attention_dropout == 0.0
    assert ModelConfig().scale_embeddings is False and ModelConfig(positions="sinusoidal").scale_embeddings is True
    assert ModelConfig(positions="sinusoidal", scale_embeddings=False).scale_embeddings is False
    assert ModelConfig().num_decoder_layers is None
    assert ModelConfig(kind="encoder_decoder", num_layers=3).num_decoder_layers == 3


@pytest.mark.parametrize("given, windows", [(None, [0, 0]), (5, [5, 5]), ((0, 3), [0, 3]), (0, [0, 0])])
def test_the_window_of_each_layer(given, windows):
    config = ModelConfig(num_layers=2, sliding_window=given)
    assert [config.window(layer) for layer in range(2)] == windows


@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="encoder", token_types=2, embed_norm=True, norm_first=False, attention_dropout=0.2),
        dict(kind="encoder_decoder", positions="relative", num_decoder_layers=2, logit_scale=0.5, decoder_start_id=3),
        dict(rope_scaling=RopeScaling("linear", 2.0), sliding_window=(0, 7, 0, 7), qk_norm=True),
        dict(attention_bias="qkv", sliding_window=9),
        dict(attention_bias=True),
    ],
    ids=str,
)
def test_json_and_back(fields):
    config = ModelConfig(**fields)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


@dataclass(frozen=True)
class Run:
    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_layers=2))


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("attention_bias=qkv", "attention_bias", "qkv"),
        ("attention_bias=true", "attention_bias", True),
        ("attention_bias=false", "attention_bias", False),
        ("sliding_window=4", "sliding_window", 4),
        ("sliding_window=4,0", "sliding_window", (4, 0)),
        ("sliding_window=none", "sliding_window", None),
        ("rope_scaling.factor=4", "rope_scaling", RopeScaling(factor=4.0)),
        ("rope_scaling.kind=linear", "rope_scaling", RopeScaling("linear")),
        ("rope_scaling=none", "rope_scaling", None),
        ("attention_dropout=0.1", "attention_dropout", 0.1),
        ("scale_embeddings=true", "scale_embeddings", True),
        ("norm_first=false", "norm_first", False),
    ],
)
@pytest.mark.parametrize("start", [{}, dict(sliding_window=(1, 2), attention_bias=True, rope_scaling=RopeScaling())])
def test_the_command_lines_words(text, name, value, start):
    run = Run(ModelConfig(num_layers=2, **start))
    given = override(run, [f"model.{text}"])
    assert getattr(given.model, name) == value and type(getattr(given.model, name)) is type(value)
    assert from_dict(Run, json.loads(json.dumps(to_dict(given)))) == given


def test_what_followed_still_follows():
    run = override(Run(), ["model.kind=encoder_decoder", "model.dropout=0.2", "model.positions=sinusoidal"])
    assert (run.model.num_decoder_layers, run.model.attention_dropout, run.model.scale_embeddings) == (2, 0.2, True)
    run = override(run, ["model.num_layers=3", "model.dropout=0.1", "model.positions=learned"])
    assert (run.model.num_decoder_layers, run.model.attention_dropout, run.model.scale_embeddings) == (3, 0.1, False)
    assert override(run, ["model.kind=decoder"]).model.num_decoder_layers is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("attention_bias=yes", "model.attention_bias: expected true or false or one of qkv, got 'yes'"),
        ("sliding_window=wide", r"model.sliding_window\[0\]: expected a whole number, got 'wide'"),
        ("rope_scaling.factr=2", "model.rope_scaling.factr: RopeScaling has no 'factr'; did you mean factor"),
        ("rope_scaling.factor=0", "model.rope_scaling: factor=0.0 must be at least 1"),
    ],
)
def test_words_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        override(Run(), [f"model.{text}"])
