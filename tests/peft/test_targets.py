"""Which modules are found, and what is said when they are not."""

import copy
import sys

import pytest
import torch
from torch import nn

from minillm.config import override
from minillm.peft import LoraConfig, LoRALinear, PartialConfig, Wrapper, merge, replace_modules, tune, unload, unmerge
from minillm.peft.names import collapse, original_parameters
from minillm.peft.record import record_of


class Scaled(Wrapper):
    """A wrapper such as another method would put around a module."""

    def __init__(self, base):
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * self.base(x)


class Shared(nn.Module):
    """One linear layer that stands in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def refused(model, config, *lines):
    """`config` is refused in one error with all of `lines`, and the model stays what it was."""
    before = {name: type(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        tune(model, config)
    for line in lines:
        assert line in str(error.value).replace("\n    ", "\n"), str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q_proj",), ["self_attn.q_proj"]),
        (("self_attn.q_proj", "mlp.up_proj"), ["self_attn.q_proj", "mlp.up_proj"]),
        (("all-linear",), [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]),
    ],
)
def test_targets_are_ends_of_paths(decoder, targets, expected):
    report = tune(decoder, LoraConfig(rank=2, targets=targets))
    assert adapted(decoder) == list(report.modules) and len(report.modules) == 3 * len(expected)
    assert all(name.endswith(tuple(expected)) for name in report.modules)


def test_a_full_path_is_one_layer(decoder):
    tune(decoder, LoraConfig(rank=2, targets=("layers.1.self_attn.q_proj",)))
    assert adapted(decoder) == ["layers.1.self_attn.q_proj"]


def test_whole_segments_only(decoder):
    refused(decoder, LoraConfig(targets=("proj",)), "'proj' matches no module")


def test_rank_and_alpha_patterns(decoder):
    config = LoraConfig(
        rank=2, alpha=4.0, rank_pattern=(("v_proj", 4),), alpha_pattern=(("layers.0.self_attn.v_proj", 16.0),)
    )
    tune(decoder, config)
    first, second = (decoder.layers[i].self_attn for i in (0, 1))
    assert (first.q_proj.rank, first.q_proj.scale) == (2, 2.0)
    assert (first.v_proj.rank, first.v_proj.scale) == (4, 4.0)
    assert (second.v_proj.rank, second.v_proj.scale) == (4, 1.0)


def test_transformers_llama(llama, tokens, perturb):
    before = llama(tokens).logits
    report = tune(llama, LoraConfig(rank=2, targets=("all-linear",)))
    assert torch.equal(llama(tokens).logits, before)
    assert str(report).splitlines()[1].strip() == "model.layers.{0..1}.self_attn.q_proj"
    assert len(report.modules) == 2 * 7  # lm_head, the output head, is left alone
    perturb(llama)
    tuned = llama(tokens).logits
    merge(llama)
    torch.testing.assert_close(llama(tokens).logits, tuned, rtol=1e-4, atol=1e-4)


def test_misspelt_target_lists_what_there_is(decoder):
    refused(
        decoder,
        LoraConfig(targets=("q_proj", "v_prj", "c_attn")),
        "LoRA does not fit this Decoder, which is unchanged:",
        "'v_prj' matches no module; did you mean v_proj",
        "'c_attn' matches no module; did you mean",
        "layers are:\nembed_tokens\nlayers.{0..2}.self_attn.q_proj\nlayers.{0..2}.self_attn.k_proj",
        "layers.{0..2}.mlp.down_proj\nlm_head",
    )


def test_everything_wrong_in_one_error(tied_decoder):
    config = LoraConfig(
        rank=17,
        targets=("mlp", "embed_tokens", "lm_head", "v_proj", "k_proj"),
        rank_pattern=(("k_proj", 2), ("o_proj", 4)),
        trainable=("layers.0.self_attn.k_proj", "nrm"),
    )
    refused(
        tied_decoder,
        config,
        "layers.{0..2}.mlp: is a GatedMLP, not a linear or embedding layer",
        "embed_tokens: its weight is tied with lm_head.weight, which would change too; untie them first",
        "lm_head: its weight is tied with embed_tokens.weight, which would change too; untie them first",
        "layers.{0..2}.self_attn.v_proj: rank 17 is outside 1..8, the ranks a 8 x 16 matrix can have",
        "lm_head: rank 17 is outside 1..16",
        "'o_proj' matches no target (in rank_pattern)",
        "layers.0.self_attn.k_proj: is a target and in `trainable`; choose one",
        "'nrm' matches no module (in trainable); did you mean norm",
    )


def test_tied_module_cannot_be_trained_beside_adapters(tied_decoder):
    refused(tied_decoder, LoraConfig(trainable=("lm_head",)), "tied with embed_tokens.weight")


def test_target_that_has_a_lora(decoder):
    tune(decoder.layers[0], LoraConfig(rank=2))
    refused(
        decoder,
        LoraConfig(rank=2),
        "layers.0 is tuned by itself; unload(model.layers.0) it first",
    )


def test_model_without_linear_layers():
    refused(
        nn.Sequential(nn.ReLU()),
        LoraConfig(),
        "'q_proj' matches no module",
        "layers are:\nnone",
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rank=0), "rank: a rank is a whole number, at least 1, not 0"),
        (
            dict(rank="8", rslora=1),
            "(?s)rank: a rank is a whole number, at least 1, not '8'.*rslora: True or False, not 1",
        ),
        (dict(rank_pattern=(("v_proj", 0),)), "v_proj: a rank is a whole number, at least 1, not 0"),
        (dict(rank_pattern={"v_proj": 0.5}), "v_proj: a rank is a whole number, at least 1, not 0.5"),
        (dict(rank_pattern="v_proj:4"), r"rank_pattern: targets with a number each, .* not 'v_proj:4'"),
        (dict(alpha_pattern=("v_proj", 4)), r"alpha_pattern: targets with a number each, .* not \('v_proj', 4\)"),
        (dict(alpha=-1.0), "alpha: an alpha is a number above 0, not -1.0"),
        (dict(alpha=None, dropout="x"), "(?s)alpha: an alpha is a number above 0, not None.*dropout: a prob.* not 'x'"),
        (dict(alpha=float("nan")), "alpha: an alpha is a number above 0, not nan"),
        (dict(dropout=1.0), r"dropout: a probability in \[0, 1\), not 1.0"),
        (dict(targets="q_proj"), r"targets: a tuple of names, not the text 'q_proj'; write \('q_proj',\)"),
        (dict(targets=None, trainable=(1,)), r"(?s)trainable: .* not \(1,\).*targets: a tuple of names, not None"),
        (dict(targets=()), 'targets: name at least one, such as "q_proj", or "all-linear"'),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**arguments)


def test_dicts_and_lists_become_tuples():
    config = LoraConfig(targets=["q_proj"], rank_pattern={"v_proj": 4}, alpha_pattern=[["v_proj", 8.0]])
    assert config == LoraConfig(targets=("q_proj",), rank_pattern=(("v_proj", 4),), alpha_pattern=(("v_proj", 8.0),))
    assert override(LoraConfig(), ["rank_pattern=q_proj:4, v_proj:8"]).rank_pattern == (("q_proj", 4), ("v_proj", 8))
    assert override(LoraConfig(), ["alpha_pattern=mlp.up_proj:4"]).alpha_pattern == (("mlp.up_proj", 4.0),)
    with pytest.raises(ValueError, match="PartialConfig:\n  modules: a tuple of names, not the text 'lm_head'"):
        PartialConfig(modules="lm_head")


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj",)])
def test_a_linear_layer_alone_has_no_place_for_an_adapter(targets):
    layer = nn.Linear(8, 8)
    with pytest.raises(
        ValueError, match=r'it is a linear or embedding layer itself, .* nn.Sequential\(layer\), with the target "0"'
    ):
        tune(layer, LoraConfig(targets=targets))
    assert layer.weight.requires_grad and record_of(layer) is None
    tune(nn.Sequential(layer), LoraConfig(targets=("0",)))


def test_whatever_fails_the_model_is_what_it_was(decoder, monkeypatch):
    decoder.norm.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in decoder.named_parameters()}

    def fail(*_args, **_options):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(sys.modules["minillm.peft.tune"], "original_parameters", fail)  # after the adapters are in
        tune(decoder, LoraConfig(rank=2))
    assert {name: (id(p), p.requires_grad) for name, p in decoder.named_parameters()} == before
    tune(decoder, LoraConfig(rank=2))


def test_partial_config(decoder, tied_decoder):
    refused(decoder, PartialConfig(("lm_hed",)), "'lm_hed' matches no module; did you mean lm_head?")
    refused(decoder, PartialConfig(("dropout",)), "dropout has no parameters")
    refused(decoder, PartialConfig(()), "name at least one module")
    refused(
        tied_decoder,
        PartialConfig(),
        "lm_head.weight: its weight is tied with embed_tokens.weight, which would change too",
        "or give PartialConfig(untie=True)",
    )


def test_untied_head_trains_without_the_embedding(tied_decoder, tokens, loss_fn):
    before, embedding = tied_decoder(tokens), tied_decoder.embed_tokens.weight.clone()
    report = tune(tied_decoder, PartialConfig(untie=True))
    assert report.trainable == 41 * 16 and torch.equal(tied_decoder(tokens), before)
    loss_fn(tied_decoder, tokens).value.backward()
    torch.optim.SGD([p for p in tied_decoder.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(tied_decoder.embed_tokens.weight, embedding)
    assert not torch.equal(tied_decoder.lm_head.weight, embedding)


def test_tied_modules_may_train_together(tied_decoder):
    assert tune(tied_decoder, PartialConfig(("embed_tokens", "lm_head"))).trainable == 41 * 16
    assert tied_decoder.lm_head.weight is tied_decoder.embed_tokens.weight


def test_methods_stack_under_a_wrapper(decoder, tokens):
    """Inside wrappers, also two of them, a module is found under the path it had; its parameters keep their names."""
    names = original_parameters(decoder)
    replaced = replace_modules(decoder, lambda name, _: name.endswith("mlp"), lambda _, m: Scaled(Scaled(m)))
    assert replaced == [f"layers.{i}.mlp" for i in range(3)]
    assert decoder.get_submodule("layers.0.mlp.base.base.up_proj")
    report = tune(decoder, LoraConfig(rank=2, targets=("layers.0.mlp.up_proj", "mlp.down_proj")))
    assert report.modules == ("layers.0.mlp.up_proj", *(f"layers.{i}.mlp.down_proj" for i in range(3)))
    after = original_parameters(decoder)
    assert all(after[name] is parameter for name, parameter in names.items())
    assert "layers.0.mlp.up_proj.lora_A" in after


def test_a_lora_around_a_wrapped_base_calls_the_wrapper(decoder):
    tune(decoder, LoraConfig(rank=2, targets=("q_proj",)))
    layer = decoder.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    expected = layer(x)
    replace_modules(decoder, lambda _, m: type(m) is nn.Linear, lambda _, m: Scaled(m))
    nn.init.constant_(layer.base.factor, 3.0)
    torch.testing.assert_close(layer(x), 3 * expected)


def test_shared_module_stays_shared():
    """One layer in two places gets one adapter, in both; in one place only, merging would change the other."""
    model = Shared()
    assert tune(model, LoraConfig(rank=2, targets=("first", "second"))).trainable == 2 * (4 + 4)
    assert isinstance(model.first, LoRALinear) and model.first is model.second
    nn.init.ones_(model.first.lora_B)
    x = torch.randn(3, 4)
    expected = model(x)
    merge(model, keep=True)
    assert model.first is model.second
    torch.testing.assert_close(model(x), expected)
    unmerge(model)
    assert model.first is model.second and torch.equal(model(x), expected)
    unload(model)
    assert type(model.first) is nn.Linear and model.first is model.second
    refused(model, LoraConfig(rank=2, targets=("first",)), "first: is also second, which would change too; target both")


def test_replace_modules_keeps_the_mode_and_is_all_or_nothing(decoder):
    decoder.eval()
    tune(decoder, LoraConfig(rank=2, dropout=0.5))
    assert not decoder.layers[0].self_attn.q_proj.dropout.training
    before = {name: type(module) for name, module in decoder.named_modules()}

    def fail_late(name, module):
        if name.startswith("layers.2"):
            raise RuntimeError("late")
        return nn.Identity()

    with pytest.raises(RuntimeError, match="late"):
        replace_modules(decoder, lambda name, _: name.endswith("mlp"), fail_late)
    assert {name: type(module) for name, module in decoder.named_modules()} == before


def test_what_is_inside_a_replaced_module_is_not_looked_at(decoder):
    replaced = replace_modules(decoder, lambda name, _: ".mlp" in name, lambda *_: nn.Tanh())
    assert sorted(replaced) == sorted(f"layers.{i}.{name}" for i in range(3) for name in ("mlp", "mlp_norm"))


def test_whole_numbers_among_the_parameters():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    tune(model, LoraConfig(rank=1, targets=("0",)))
    assert not model.codes.requires_grad


def test_a_deep_copy_is_tuned_too(decoder, tokens, perturb):
    tune(decoder, LoraConfig(rank=2))
    perturb(decoder)
    twin = copy.deepcopy(decoder)
    merge(twin)
    assert adapted(twin) == [] and adapted(decoder)
    torch.testing.assert_close(twin(tokens), decoder(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "names, short",
    [
        (["a.0.q", "a.1.q", "a.2.q"], ["a.{0..2}.q"]),
        (["a.0.q", "a.2.q", "b"], ["a.{0,2}.q", "b"]),
        (["a.3.q"], ["a.3.q"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.{0..1}.e.{0..1}.w"]),
        (["l.0.e.0.w", "l.1.e.1.w"], ["l.0.e.0.w", "l.1.e.1.w"]),
        ([f"{i}" for i in range(12)], ["{0..11}"]),
        ([], []),
    ],
)
def test_collapse(names, short):
    assert collapse(names) == short


def test_all_linear_leaves_out_what_trains_in_full():
    """A new head of two linear layers, of which only one has a name that heads have."""

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.dense, self.classifier = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2)

    model = Headed()
    assert LoraConfig(targets=("all-linear",)).plan(model).adapted == ("body.0", "dense")
    plan = LoraConfig(targets=("all-linear",), trainable=("dense", "classifier")).plan(model)
    assert plan.adapted == ("body.0",) and {"dense.weight", "classifier.bias"} <= plan.parameters.keys()
