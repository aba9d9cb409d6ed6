"""Several adapters on one base: adding, switching, training, deleting, saving and merging them by name."""

import copy
import dataclasses
import sys

import pytest
import torch

from minillm.peft import (
    BottleneckConfig,
    FullConfig,
    LoraConfig,
    LoRALinear,
    PartialConfig,
    PromptConfig,
    QLoraConfig,
    activate,
    load_adapter,
    merge,
    save_adapter,
    tune,
    tunings_of,
    unload,
    unmerge,
)

Q = LoraConfig(rank=2, alpha=6.0, targets=("q_proj",), trainable=("norm",))
PLAIN = LoraConfig(rank=2, alpha=6.0, targets=("q_proj",))
V = LoraConfig(rank=3, alpha=5.0, targets=("v_proj", "q_proj"), trainable=("norm",))


def trains(model):
    return {name for name, tuning in tunings_of(model).items() for p in tuning.parameters().values() if p.requires_grad}


def wrappers(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


@pytest.fixture
def alternatives(decoder, tokens, perturb):
    """(model with the adapters a and b, each trained on the base alone; what base, a and b compute)"""
    outputs = {"": decoder(tokens)}
    tune(decoder, Q, name="a")
    outputs["a"] = perturb(decoder, 3)(tokens)
    activate(decoder)
    tune(decoder, V, name="b")
    outputs["b"] = perturb(decoder, 4)(tokens)
    return decoder, outputs


def test_switching_between_alternatives(alternatives, tokens):
    model, outputs = alternatives
    for names in (("a",), ("b",), (), ("b",), ("a",)):
        activate(model, *names)
        assert torch.equal(model(tokens), outputs["".join(names)])
        assert trains(model) == set(names)
        assert {p.requires_grad for n, p in model.named_parameters() if n == "norm.weight"} == {bool(names)}


def test_each_adapter_has_its_own_head(alternatives):
    model, _ = alternatives
    norms = {name: tunings_of(model)[name].parameters()["norm.weight"] for name in "ab"}
    assert not torch.equal(norms["a"], norms["b"])
    for name in "ab":
        activate(model, name)
        assert model.norm.weight is norms[name]
    activate(model)
    assert all(model.norm.weight is not norm for norm in norms.values())
    assert torch.equal(model.norm.weight, torch.ones(16))


def test_an_inactive_adapter_is_out_of_the_model(alternatives):
    model, _ = alternatives
    activate(model)
    assert not wrappers(model) and not any(p.requires_grad for p in model.parameters())
    activate(model, "a")
    assert len(wrappers(model)) == 3


def test_both_together_add_up(decoder, perturb):
    """LoRA is additive: with both, each layer has W + s_a B_a A_a + s_b B_b A_b, in float64."""
    model = decoder
    for name, config in {"a": PLAIN, "b": dataclasses.replace(V, trainable=())}.items():
        activate(model) if tunings_of(model) else None
        tune(model, config, name=name)
        perturb(model)
    activate(model, "b", "a")  # whatever the order of asking, that of adding holds
    assert len(wrappers(model)) == 9  # three of them one inside another
    model.double()
    layer = model.layers[1].self_attn.q_proj
    x = torch.randn(4, 16, dtype=torch.float64)
    weight = layer.base.base.weight
    for lora in (layer, layer.base):
        weight = weight + lora.scale * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-12, atol=1e-12)
    assert (layer.adapter, layer.base.adapter) == ("b", "a") and trains(model) == {"a", "b"}


def test_two_heads_cannot_both_be_active(alternatives):
    """Each has a norm of its own, and the model has place for one: the other's would be left out without a word."""
    model, _ = alternatives
    with pytest.raises(ValueError, match=r"'a' and 'b' each have their own norm.weight: choose one of them"):
        activate(model, "a", "b")
    assert [name for name, tuning in tunings_of(model).items() if tuning.active] == ["b"]


def test_full_tuning_leaves_no_base_to_go_back_to(decoder, tokens):
    tune(decoder, PLAIN, name="a")
    tune(decoder, FullConfig(), name="all")
    with pytest.raises(ValueError, match="'all' has trained the base's own weights, of which there is no other copy"):
        activate(decoder, "a")
    activate(decoder, "a", "all")


def test_full_tuning_beside_an_adapter_that_rests(decoder):
    tune(decoder, PLAIN, name="a")
    activate(decoder)
    with pytest.raises(ValueError, match="full tuning would change the base under 'a', not active now"):
        tune(decoder, FullConfig(), name="all")


def test_what_trained_before_trains_again(decoder):
    tune(decoder, Q, name="a")
    tune(decoder, V, name="b")
    unload(decoder, "b")
    assert trains(decoder) == {"a"}


def test_the_fingerprint_is_that_of_the_base_whatever_is_active(decoder, perturb, tokens, tmp_path):
    fresh = copy.deepcopy(decoder)
    tune(decoder, Q, name="a")
    perturb(decoder)
    save_adapter(decoder, tmp_path / "a", "a")
    tune(decoder, V, name="b")
    perturb(decoder)
    expected = decoder(tokens)
    for i, active in enumerate((("a", "b"), ("b",), ("a",), ())):
        activate(decoder, *active)
        save_adapter(decoder, tmp_path / f"b{i}", "b")
    saved = [(tmp_path / f"b{i}" / "minillm.json").read_text() for i in range(4)]
    assert len(set(saved)) == 1
    load_adapter(fresh, tmp_path / "a", "another_name")
    load_adapter(fresh, tmp_path / "b1", "b")
    assert torch.equal(fresh(tokens), expected)


def test_a_stack_on_another_precision(decoder, perturb, tokens, tmp_path):
    """check_base=False stands the adapter on those it was trained on, or says which are missing."""
    fresh = copy.deepcopy(decoder).double()
    for name, config in {"a": Q, "b": V}.items():
        tune(decoder, config, name=name)
        save_adapter(perturb(decoder), tmp_path / name, name)
    with pytest.raises(ValueError, match=r"it was trained on top of the adapter.s. 'a': load those first"):
        load_adapter(fresh, tmp_path / "b", "b", check_base=False)
    load_adapter(fresh, tmp_path / "a", "a", check_base=False)
    load_adapter(fresh, tmp_path / "b", "b", check_base=False)
    torch.testing.assert_close(fresh(tokens).float(), decoder(tokens), rtol=1e-4, atol=1e-4)


def test_what_is_out_of_the_model_follows_its_dtype(alternatives, tokens):
    model, _ = alternatives
    model.double()
    for names in (("a",), (), ("b",)):
        activate(model, *names)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}, names
    unload(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_failing_load_leaves_what_was_active(alternatives, tmp_path, monkeypatch):
    model, _ = alternatives
    save_adapter(model, tmp_path / "b", "b")
    activate(model, "a")

    def fail(*_args):
        raise MemoryError

    monkeypatch.setattr(LoraConfig, "install", fail)
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path / "b", "again")
    assert trains(model) == {"a"} and list(tunings_of(model)) == ["a", "b"]


def test_a_failing_quantization_leaves_the_base(decoder, monkeypatch):
    before = {name: (type(m), id(m)) for name, m in decoder.named_modules()}
    monkeypatch.setattr(sys.modules["minillm.peft.tune"], "own_copies", lambda *_: 1 / 0)
    for config in (QLoraConfig(rank=2), PromptConfig(length=2), BottleneckConfig()):
        with pytest.raises(ZeroDivisionError):
            tune(decoder, config)
        assert {name: (type(m), id(m)) for name, m in decoder.named_modules()} == before
        assert not tunings_of(decoder) and "hidden" not in vars(decoder)
        assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_modes_stay(decoder):
    """A module in eval mode, such as a dropout that somebody switched off, is so afterwards."""
    decoder.layers[0].mlp.down_proj.eval()
    tune(decoder, BottleneckConfig())
    assert not decoder.layers[0].mlp.base.down_proj.training and decoder.layers[0].mlp.training
    unload(decoder)
    assert not decoder.layers[0].mlp.down_proj.training and decoder.layers[0].mlp.training


def test_only_the_wanted_adapter_trains(decoder, tokens, loss_fn):
    """Peers silently trained the wrong one: after a second adapter came, after loading, after switching."""
    tune(decoder, PLAIN, name="a")
    tune(decoder, V, name="b")
    assert trains(decoder) == {"b"}
    activate(decoder, "a", "b")
    assert trains(decoder) == {"a", "b"}
    activate(decoder, "a", "b", train=["a"])
    assert trains(decoder) == {"a"}
    frozen = {name: p.clone() for name, p in tunings_of(decoder)["b"].parameters().items() if name != "norm.weight"}
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    loss_fn(decoder, tokens).value.backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in tunings_of(decoder)["b"].parameters().items() if n in frozen)


def test_unload_one(alternatives, tokens):
    model, outputs = alternatives
    unload(model, "a")
    assert list(tunings_of(model)) == ["b"] and torch.equal(model(tokens), outputs["b"])
    unload(model, "b")
    assert not tunings_of(model) and torch.equal(model(tokens), outputs[""])
    assert all(p.requires_grad for p in model.parameters())


def test_unload_all_from_a_stack(decoder, tokens, perturb):
    before = decoder(tokens)
    for name, config in {"a": Q, "b": V, "c": PartialConfig(("norm",))}.items():
        tune(decoder, config, name=name)
        perturb(decoder)
    unload(decoder)
    assert torch.equal(decoder(tokens), before) and not wrappers(decoder)


def test_what_others_stand_on_stays(decoder):
    tune(decoder, Q, name="a")
    tune(decoder, V, name="b")
    with pytest.raises(ValueError, match="'b' was trained on top of 'a'; unload 'b' first"):
        unload(decoder, "a")
    unload(decoder, "b")
    unload(decoder, "a")


def test_wrong_names(alternatives):
    model, _ = alternatives
    before = wrappers(model)
    with pytest.raises(ValueError, match=r"(?s)model has 'a', 'b':.*no adapter 'c'.*'a' is to train, but not to be"):
        activate(model, "b", "c", train=["a"])
    with pytest.raises(ValueError, match=r"no adapter 'x' to unload: the model has 'a', 'b'"):
        unload(model, "x")
    with pytest.raises(ValueError, match=r"which adapter to save: the model has 'a', 'b'"):
        save_adapter(model, "nowhere")
    with pytest.raises(ValueError, match=r"'a.b' cannot name an adapter"):
        tune(model, Q, name="a.b")
    with pytest.raises(ValueError, match=r"it has an adapter 'a': LoraConfig"):
        tune(model, Q, name="a")
    assert wrappers(model) == before and list(tunings_of(model)) == ["a", "b"]


def test_alternatives_by_file(alternatives, tokens, decoder, tmp_path):
    model, outputs = alternatives
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
    fresh = copy.deepcopy(model)
    unload(fresh)
    load_adapter(fresh, tmp_path / "a", "first")
    load_adapter(fresh, tmp_path / "b", "second")  # trained on the base alone: the first is there, but not active
    assert torch.equal(fresh(tokens), outputs["b"]) and trains(fresh) == {"second"}
    activate(fresh, "first")
    assert torch.equal(fresh(tokens), outputs["a"])


def test_a_stack_by_file(decoder, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(decoder)
    tune(decoder, Q, name="a")
    perturb(decoder)
    save_adapter(decoder, tmp_path / "a")
    tune(decoder, V, name="b")
    perturb(decoder)
    save_adapter(decoder, tmp_path / "b", "b")
    with pytest.raises(ValueError, match=r"it was trained on top of the adapter.s. 'a': load those first"):
        load_adapter(fresh, tmp_path / "b")
    load_adapter(fresh, tmp_path / "a", "a")
    load_adapter(fresh, tmp_path / "b", "b")
    assert torch.equal(fresh(tokens), decoder(tokens))


def test_merging_a_stack_and_back(decoder, tokens, perturb):
    keys = list(decoder.state_dict())
    for name, config in {"a": Q, "b": V}.items():
        tune(decoder, config, name=name)
        perturb(decoder)
    tuned = decoder(tokens)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    merge(decoder, keep=True)
    assert list(decoder.state_dict()) == keys
    torch.testing.assert_close(decoder(tokens), tuned, rtol=1e-4, atol=1e-4)
    unmerge(decoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert torch.equal(decoder(tokens), tuned)
    merge(decoder)
    assert list(decoder.state_dict()) == keys and not tunings_of(decoder)


def test_merging_beside_an_inactive_adapter_is_refused(alternatives):
    model, _ = alternatives
    with pytest.raises(ValueError, match=r"'a' is not active"):
        merge(model)
    unload(model, "a")
    merge(model)


def test_a_stack_survives_a_failing_merge(decoder, tokens, perturb):
    tune(decoder, Q, name="a")
    perturb(decoder)
    tune(decoder, V, name="b")
    with torch.no_grad():
        tunings_of(decoder)["b"].parameters()["layers.2.self_attn.q_proj.lora_B"].fill_(torch.inf)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj: NaN or infinity"):
        merge(decoder)
    after = decoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
