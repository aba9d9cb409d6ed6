import math

import pytest

from minillm.config import from_dict, override, to_dict
from minillm.training import TrainConfig


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(ValueError) as error:
        TrainConfig(
            steps=0,
            lr=math.nan,
            warmup_ratio=1.5,
            beta2=1.0,
            clip=-1,
            accumulate=1.5,
            schedule="cosin",
            precision="fp16",
        )
    message = str(error.value)
    assert message.startswith("this training cannot be done:")
    for line in (
        "steps=0: expected a whole number, at least 1",
        "lr=nan: expected a number above 0",
        "warmup_ratio=1.5: expected a number at least 0 and at most 1",
        "beta2=1.0: expected a number at least 0 and below 1",
        "clip=-1: expected a number at least 0",
        "accumulate=1.5: expected a whole number, at least 1",
        "schedule='cosin': did you mean cosine?",
        "precision='fp16': did you mean one of float32, bfloat16?",
    ):
        assert line in message


def test_every_number_has_a_rule():
    """A field added later cannot be forgotten in the validation: text is refused in every one of them."""
    for name in to_dict(TrainConfig()):
        with pytest.raises(ValueError, match=f"{name}='wrong'"):
            TrainConfig(**{name: "wrong"})


def test_survives_json_and_overrides():
    config = TrainConfig(steps=7, precision="bfloat16")
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert override(config, ["lr=1e-4", "schedule=linear", "compile=true"]) == TrainConfig(
        steps=7, precision="bfloat16", lr=1e-4, schedule="linear", compile=True
    )


def test_patience_needs_evaluations():
    with pytest.raises(ValueError, match="patience=3: needs evaluations during training, but eval_every=0"):
        TrainConfig(patience=3, eval_every=0)
