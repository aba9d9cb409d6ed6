"""Bad input to every method: one error that lists all that is wrong, and a model that is bit for bit what it was."""

import dataclasses
import math

import pytest
import torch
from contract_cases import CASES, CONFIGS, compute, make_batch, make_model
from torch import nn

from minillm.models import build
from minillm.peft import (
    METHODS,
    AdapterConfig,
    CannotMerge,
    LoraConfig,
    activate,
    load_adapter,
    merge,
    num_parameters,
    rows,
    save_adapter,
    tune,
    tunings_of,
    unload,
    unmerge,
)


def fields_of(name):
    return {field.name for field in dataclasses.fields(METHODS[name])}


BY_TARGETS = [name for name in METHODS if "targets" in fields_of(name)]
BY_RANK = [name for name in METHODS if "rank" in fields_of(name)]
ADAPTERS = [name for name in METHODS if issubclass(METHODS[name], AdapterConfig)]
PROMPTS = ["prompt", "ptuning", "prefix"]


def config_of(name, **changes):
    """The contract's config for the decoder, with other values."""
    return dataclasses.replace(CASES[name].of("decoder"), **changes)


def aimed(name, *targets, **changes):
    """That config with other targets."""
    changes |= {"feedforward": ()} if name == "ia3" else {}  # the names of some of the targets
    return config_of(name, targets=targets, **changes)


def prepared(name, **changes):
    """A decoder with what the method needs on it."""
    torch.manual_seed(0)
    model = build(dataclasses.replace(CONFIGS["decoder"], **changes))
    CASES[name].prepare(model)
    return model


def state(model):
    modules = [(path, id(m), m.training) for path, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (path, id(t), t.requires_grad, t.detach().clone())
        for group in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for path, t in group
    ]
    adapters = [(t.name, t.active, t.trains, t.config) for t in tunings_of(model).values()]
    return modules, sorted(vars(model)), adapters, tensors


def refused(model, act, *lines, error=ValueError):
    """`act` raises one error with each of `lines`, and `model` stays what it was; the lines of the error."""
    before = state(model)
    with pytest.raises(error) as caught:
        act()
    for line in lines:
        assert line in str(caught.value), str(caught.value)
    after = state(model)
    assert after[:3] == before[:3]
    assert [t[:3] for t in after[3]] == [t[:3] for t in before[3]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(after[3], before[3], strict=True))
    return str(caught.value).splitlines()


def problems(lines):
    """The lines of an error that say what is wrong: indented once."""
    return [line.strip() for line in lines if line.startswith("  ") and not line.startswith("    ")]


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", BY_TARGETS)
@pytest.mark.parametrize("targets", [("q_prj",), ("v_proj", "q_prj")], ids=["none", "one of two"])
def test_a_target_that_matches_nothing(name, targets):
    model = prepared(name)
    config = aimed(name, *targets)
    for act in (lambda: tune(model, config, "new"), lambda: num_parameters(config, model)):
        lines = refused(model, act, "unchanged:", "layers.{0..2}.self_attn.q_proj")
        (line,) = problems(lines)
        assert line.startswith("'q_prj' matches no module; did you mean q_proj")


DOUBLY = {
    ("q_proj", "self_attn.q_proj"): "layers.{0..2}.self_attn.q_proj: is meant by 'q_proj' and 'self_attn.q_proj'",
    ("layers.1.self_attn.q_proj", "q_proj"): (
        "layers.1.self_attn.q_proj: is meant by 'layers.1.self_attn.q_proj' and 'q_proj'"
    ),
    ("v_proj", "v_proj"): "layers.{0..2}.self_attn.v_proj: is meant by 'v_proj' and 'v_proj'",
    ("all-linear", "v_proj"): "layers.{0..2}.self_attn.v_proj: is meant by 'all-linear' and 'v_proj'",
}


@pytest.mark.parametrize("name", BY_TARGETS)
@pytest.mark.parametrize("targets", DOUBLY, ids="+".join)
def test_two_targets_that_mean_the_same_module(name, targets):
    model = prepared(name)
    lines = refused(model, lambda: tune(model, aimed(name, *targets), "new"))
    assert problems(lines) == [f"{DOUBLY[targets]}; leave one out"]


def test_all_doubles_and_all_else_are_in_one_error():
    model = prepared("lora")
    targets = ("q_proj", "k_prj", "self_attn.q_proj", "mlp.up_proj", "layers.2.mlp.up_proj")
    lines = refused(model, lambda: tune(model, LoraConfig(rank=2, targets=targets)))
    assert [line.partition(";")[0] for line in problems(lines)] == [
        "'k_prj' matches no module",
        "layers.{0..2}.self_attn.q_proj: is meant by 'q_proj' and 'self_attn.q_proj'",
        "layers.2.mlp.up_proj: is meant by 'mlp.up_proj' and 'layers.2.mlp.up_proj'",
    ]


class Nested(nn.Module):
    """The path of one layer is the end of the other's."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["fc"](self.fc(x))


def test_whole_paths_are_not_meant_for_longer_ones_that_end_so():
    """Written-out paths, as a combined adapter has them, always name every layer once."""
    model = Nested()
    report = tune(model, LoraConfig(targets=("fc", "inner.fc"), rank=2, rank_pattern={"fc": 1, "inner.fc": 3}))
    assert report.modules == ("fc", "inner.fc")
    assert (model.fc.rank, model.inner["fc"].rank) == (1, 3)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_two_keys_of_a_pattern_for_one_target(field):
    model = prepared("lora")
    both = {"q_proj": 2, "self_attn.q_proj": 4}
    line = f"layers.{{0..2}}.self_attn.q_proj: {field}: 'q_proj': 2 and 'self_attn.q_proj': 4 both mean it; leave one"
    refused(model, lambda: tune(model, LoraConfig(**{field: both})), line)
    same = dict.fromkeys(both, 3)
    assert tune(model, LoraConfig(**{field: same})).trainable > 0  # nothing to be wrong about
    unload(model)
    tune(model, LoraConfig(**{field: {"q_proj": 2, "layers.1.self_attn.q_proj": 4}}))  # a whole path goes first
    layers = [block.self_attn.q_proj for block in model.layers]
    found = [layer.rank if field == "rank_pattern" else layer.scale * layer.rank for layer in layers]
    assert found == [2, 4, 2]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trainable_module_that_is_not_there(name):
    model = prepared(name)
    lines = refused(model, lambda: tune(model, config_of(name, trainable=("lm_hed", "norm")), "new"), "unchanged:")
    assert len(problems(lines)) == 1
    assert problems(lines)[0].startswith("'lm_hed' matches no module (in trainable); did you mean lm_head")


def test_names_of_methods_without_targets():
    model = prepared("pruned_bitfit")
    for name, changes, line in (
        ("partial", dict(modules=("norm", "lm_hed")), "'lm_hed' matches no module; did you mean lm_head"),
        ("bitfit", dict(biases=("q_proj", "up_prj")), "'up_prj' matches no bias; did you mean up_proj"),
        ("pruned_bitfit", dict(kept=(("layers.7.norm.bias", (0,)),)), "layers.7.norm.bias is no bias of a linear"),
        ("fusion", dict(adapters=("a", "c")), "there is no adapter 'c' on the model"),
    ):
        refused(model, lambda n=name, c=changes: tune(model, config_of(n, **c), "new"), line, "unchanged:")


# ------------------------------------------------------------------------------------------ ranks, experts, tied layers


@pytest.mark.parametrize("name", BY_RANK)
def test_rank_zero(name):
    with pytest.raises(ValueError, match=r"rank: .*at least 1, not 0"):
        config_of(name, rank=0)


@pytest.mark.parametrize("name", BY_RANK)
def test_a_rank_above_the_layer(name):
    """v_proj is 16 -> 8; in groups of 4 QA-LoRA's A has 4 columns, so the product has no more ranks."""
    model = prepared(name)
    changes = {"target_rank": 9, "max_rank": 9} if name == "increlora" else {}
    lines = refused(model, lambda: tune(model, aimed(name, "v_proj", rank=9, **changes), "new"))
    (line,) = problems(lines)
    assert line.startswith("layers.{0..2}.self_attn.v_proj: rank 9 is outside 1..")


def test_more_experts_chosen_than_there_are():
    model = prepared("mola")
    config = config_of("mola", experts=5, shape="inverted-triangle", per_layer=(4, 1, 3), top_k=3)
    (line,) = problems(refused(model, lambda: tune(model, config)))
    assert line.startswith("layers.1.self_attn.q_proj") and "top_k" in line


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_tied_module_cannot_train_beside(name):
    model = prepared(name, tie_embeddings=True)
    lines = refused(model, lambda: tune(model, config_of(name, trainable=("lm_head",)), "new"))
    (line,) = problems(lines)
    assert "lm_head" in line and "tied with embed_tokens.weight" in line and "untie them" in line


@pytest.mark.parametrize("name", BY_TARGETS)
def test_a_tied_target(name):
    if name == "bottleneck":
        pytest.skip("an adapter after a layer leaves the layer's weight as it is")
    model = prepared(name, tie_embeddings=True)
    lines = refused(model, lambda: tune(model, aimed(name, "lm_head"), "new"))
    assert any("lm_head" in line and "tied with embed_tokens.weight" in line for line in problems(lines))


# ---------------------------------------------------------------------------------------- tuned, merged, another's base


@pytest.mark.parametrize("name", METHODS)
def test_what_a_merged_model_refuses(name, tmp_path):
    model = prepared(name)
    config = config_of(name)
    tune(model, config, "new")
    if config.cannot_merge:
        refused(model, lambda: merge(model, keep=True), config.cannot_merge, error=CannotMerge)
        return
    merge(model, keep=True)
    once = "merged for a time; unmerge(model) first"
    refused(model, lambda: merge(model), "merged already; unmerge(model) gives the adapters back")
    refused(model, lambda: tune(model, LoraConfig(rank=2), "other"), once)
    refused(model, lambda: activate(model, "new"), once)
    refused(model, lambda: save_adapter(model, tmp_path / "adapter"), once)
    assert not (tmp_path / "adapter").exists()
    unmerge(model)
    refused(model, lambda: unmerge(model), "unmerge undoes merge(model, keep=True), and nothing else")
    merge(model)
    for act, word in ((merge, "merge"), (unload, "unload"), (unmerge, "unmerge")):
        refused(model, lambda act=act: act(model), f"nothing to {word}: this Decoder is not tuned")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_an_adapter_of_another_model(name, kind, tmp_path):
    model, other = prepared(name), make_model(kind)
    tune(model, config_of(name), "new")
    save_adapter(model, tmp_path / "adapter", "new")
    lines = refused(other, lambda: load_adapter(other, tmp_path / "adapter", "new"))
    assert f"does not fit this {type(other).__name__}" in lines[0] and "unchanged" in lines[0]
    assert len(problems(lines)) >= 1


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_longer_than_the_positions(name):
    model, changes = make_model("decoder"), {"init_tokens": ()} if name != "ptuning" else {}
    lines = refused(model, lambda: tune(model, config_of(name, length=32, **changes)))
    assert len(problems(lines)) == 1 and "32" in problems(lines)[0]
    tune(model, config_of(name, length=24, **changes))
    refused(model, lambda: compute(model, make_batch("decoder")), "9", "24", "32")


def test_names_of_a_mixed_batch():
    model = make_model("decoder")
    tune(model, LoraConfig(rank=2), "poems")
    activate(model)

    def mix():
        with rows(model, ["poems", None, "poem", "code"]):
            raise AssertionError("the block must not run")

    lines = refused(model, mix, "unchanged:")
    assert [line.partition(";")[0] for line in problems(lines)] == [
        "there is no adapter 'poem'",
        "there is no adapter 'code'",
    ]


# -------------------------------------------------------------------------------------------------------------- configs

WRONG = {  # several wrong values at once: every one of them is in the error
    "lora": dict(rank="8", alpha=None, targets="q_proj", dropout=1, rslora=1, rank_pattern=3, trainable=[1]),
    "qlora": dict(rank=1.5, alpha=0, targets=None, block=63, double_quantization="yes"),
    "qalora": dict(rank=True, alpha="16", targets=(1,), group=0, dropout=-0.1, trainable="lm_head"),
    "ia3": dict(targets="k_proj", feedforward=3, trainable={"norm"}),
    "bitfit": dict(biases=1, create_missing="no", trainable="norm"),
    "pruned_bitfit": dict(kept=3, trainable="norm"),
    "bottleneck": dict(kind="holsby", reduction="16", activation=3, scaling=0, init=None, dropout=2, leave_out=1),
    "fusion": dict(adapters="a", dropout=None, regularization=-1, trainable=3),
    "prompt": dict(length=2.5, init=3, init_tokens="the", trainable=(None,)),
    "ptuning": dict(length=0, hidden_size="6", encoder="gru", layers=None, dropout=1.0),
    "prefix": dict(length="3", projection_size=-1, gated=0, dropout=None, init_tokens=5, parts="decoder"),
    "increlora": dict(rank=0, target_rank=None, winners=1.5, beta1=1, alpha=-1, targets=(), orthogonality=math.nan),
    "mola": dict(experts=0, shape=["diamond"], per_layer=(0,), top_k="2", rank=None, alpha=math.inf, balance="x"),
    "full": {},  # has no fields
    "partial": dict(modules="lm_head", untie=0, last=-1, pattern=b"norm"),
}


def test_every_method_has_wrong_values():
    assert set(WRONG) == set(METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if WRONG[name]])
def test_all_wrong_values_are_in_one_error(name):
    with pytest.raises(ValueError) as error:
        METHODS[name](**WRONG[name])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{METHODS[name].__name__}:"
    for field, value in WRONG[name].items():
        assert any(line.strip().startswith(field) for line in lines), (field, value, str(error.value))


VALID = {"pruned_bitfit": dict(kept=(("up_proj.bias", (1,)),))}


@pytest.mark.parametrize("name", [name for name in METHODS if WRONG[name]])
def test_no_field_takes_what_is_nothing_of_its_kind(name):
    """Any object, a number that is none, a list in a list, bytes: the field is named in a ValueError, never a crash."""
    for field in fields_of(name):
        for value in (object(), math.nan, [[]], b"x", -1):
            with pytest.raises(ValueError, match=field):
                METHODS[name](**VALID.get(name, {}) | {field: value})
