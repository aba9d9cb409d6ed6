"""AdapterFusion: its formula by hand in float64, and what becomes of it when it is saved, loaded and switched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from minillm.models import ModelConfig, build
from minillm.peft import (
    CannotMerge,
    LoraConfig,
    activate,
    auxiliary_loss,
    load_adapter,
    merge,
    num_parameters,
    save_adapter,
    tune,
    tunings_of,
    unload,
)
from minillm.peft.bottleneck_config import BottleneckConfig
from minillm.peft.fusion import Fusion, FusionConfig

D = 12
BOTH = FusionConfig(("a", "b"))


def encoder(norm_first=False):
    torch.manual_seed(0)
    fields = {"vocab_size": 31, "hidden_size": D, "num_layers": 2, "num_heads": 3, "max_positions": 32}
    return build(ModelConfig(kind="encoder", norm="layer", norm_first=norm_first, init_std=0.2, **fields))


def randomize(parameters, std=0.4):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def with_adapters(model, kind="pfeiffer", names="ab", **fields):
    """Random adapters of sizes 2, 3, ... on the base, each alone, and then all active."""
    for size, name in enumerate(names, 2):
        if tunings_of(model):
            activate(model)
        tune(model, BottleneckConfig(kind, size=size, **fields), name)
        randomize(trainable(model))
    activate(model, *names)
    return model


def fused(kind="pfeiffer", norm_first=False, config=BOTH):
    """An encoder with a fusion of random weights, named "f"."""
    model = with_adapters(encoder(norm_first), kind)
    tune(model, config, "f")
    randomize(trainable(model))
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_is_the_formula_by_hand_and_so_are_all_gradients(kind, norm_first):
    base = encoder(norm_first).double().layers[0]
    model = with_adapters(encoder(norm_first).double(), kind)
    tune(model, BOTH, "f")
    randomize(trainable(model))
    owners = {name: tunings_of(model)[name].parameters() for name in ("a", "b", "f")}
    w = {(o, n): p.detach().clone().requires_grad_() for o, named in owners.items() for n, p in named.items()}
    act = F.relu if kind == "pfeiffer" else F.silu

    def linear(owner, name, h):
        return F.linear(h, w[owner, f"layers.0.{name}.weight"], w.get((owner, f"layers.0.{name}.bias")))

    def around(place, s, norm, x):
        """s + sum_i p_i V u_i at one place."""
        h = norm(s + x) if kind == "pfeiffer" and not norm_first else s
        u = [linear(name, f"{place}.up", act(linear(name, f"{place}.down", h))) for name in ("a", "b")]
        query = linear("f", f"{place}.query", h)
        scores = torch.stack([(query * linear("f", f"{place}.key", u_i)).sum(-1) for u_i in u], -1)  # no 1 / sqrt(D)
        p = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return s + sum(p[..., i : i + 1] * linear("f", f"{place}.value", u[i]) for i in range(2))

    x = torch.randn(2, 5, D, dtype=torch.float64)
    hidden = x
    for place, norm, sublayer in (
        ("self_attn", base.attn_norm, base.self_attn),
        ("mlp", base.mlp_norm, base.mlp),
    ):
        s = sublayer(norm(hidden)) if norm_first else sublayer(hidden)
        s = around(place, s, norm, hidden) if place == "mlp" or kind == "houlsby" else s
        hidden = hidden + s if norm_first else norm(hidden + s)
    y = model.layers[0](x)
    torch.testing.assert_close(y, hidden, rtol=1e-12, atol=1e-12)
    own = {name: p for name, p in owners["f"].items() if name.startswith("layers.0.")}
    ours = torch.autograd.grad(y.pow(3).sum(), list(own.values()))
    theirs = torch.autograd.grad(hidden.pow(3).sum(), [w["f", name] for name in own])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_fusion_of_equal_adapters_is_either_of_them(tokens):
    """V is the identity but for 1e-6, and the weights of two equal things sum to 1."""
    model = encoder()
    tune(model, BottleneckConfig("pfeiffer", size=3), "a")
    randomize(trainable(model))
    alone = model(tokens)
    activate(model)
    tune(model, BottleneckConfig("pfeiffer", size=3), "b")
    for name, parameter in tunings_of(model)["b"].parameters().items():
        parameter.data.copy_(tunings_of(model)["a"].parameters()[name])
    activate(model, "a", "b")
    tune(model, BOTH, "f")
    torch.testing.assert_close(model(tokens), alone, rtol=1e-4, atol=1e-4)


def test_counts_are_the_formula():
    for kind, places in (("pfeiffer", 2), ("houlsby", 4)):
        model = with_adapters(encoder(), kind)
        assert num_parameters(BOTH, model) == places * (3 * D * D + 2 * D)
        assert tune(model, BOTH, "f").trainable == places * (3 * D * D + 2 * D)


def test_the_start_is_adapterhubs():
    layer = nn.Linear(200, 200)
    model = nn.Sequential(layer)
    for name in "ab":
        tune(model, BottleneckConfig(targets=("0",)), name)
        activate(model)
    activate(model, "a", "b")
    tune(model, BOTH, "f")
    fusion = model[0]
    assert torch.equal(fusion.value.weight, torch.full((200, 200), 1e-6).fill_diagonal_(1.0))
    assert fusion.value.bias is None
    for part in (fusion.query, fusion.key):  # 40,000 draws: the std is within 1.5 % (four sigma)
        assert part.weight.detach().std() == pytest.approx(0.02, rel=0.015) and not part.bias.any()
    assert "it averages adapters" in FusionConfig.start


def test_only_the_fusion_trains(tokens):
    model = fused()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    leaves = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    assert names == {f"layers.{i}.mlp.{leaf}" for i in range(2) for leaf in leaves}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in names}
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    model(tokens).pow(3).sum().backward()
    for name in names:  # q.b is added to the scores of all adapters, so the key's bias changes no weight
        assert (model.get_parameter(name).grad.norm() < 1e-4) == name.endswith("key.bias"), name
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name


def test_the_penalty_draws_v_to_the_identity():
    model = with_adapters(encoder())
    tune(model, BOTH, "f")
    off = D * (D - 1) * 1e-12  # each place starts with 1e-6 off the diagonal
    torch.testing.assert_close(auxiliary_loss(model), torch.tensor(0.01 * 2 * off), rtol=1e-4, atol=0)
    randomize(trainable(model))
    v = [layer.mlp.value.weight for layer in model.layers]
    penalty = auxiliary_loss(model)
    expected = 0.01 * sum((torch.eye(D) - m).square().sum() for m in v)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.grad is not None} == {"value"}
    torch.testing.assert_close(v[0].grad, 0.02 * (v[0].detach() - torch.eye(D)))
    activate(model, "a", "b", "f", train=("a",))
    assert auxiliary_loss(model) is None
    free = fused(config=FusionConfig(("a", "b"), regularization=0.0))
    assert auxiliary_loss(free) is None


def test_two_fusions_on_one_another_have_their_own_penalties(tokens):
    model = fused()
    before = auxiliary_loss(model).detach()
    for name in "cd":
        activate(model, "a", "b", "f")
        tune(model, BottleneckConfig("pfeiffer", size=2), name)
        randomize(trainable(model))
    activate(model, "a", "b", "f", "c", "d")
    tune(model, FusionConfig(("c", "d")), "g")
    assert torch.isfinite(model(tokens)).all()
    assert auxiliary_loss(model) < 1e-9  # g's alone: its V is all but the identity
    activate(model, *tunings_of(model))
    torch.testing.assert_close(auxiliary_loss(model).detach(), before)


def test_toy_mistake_adding_in_place(tokens):
    """`value += residual` would change what the keys are made of, and the module's output, which others may hold."""
    model, held = fused("houlsby"), []
    for module in (model.layers[0].mlp.base.base.base, *(m.up for m in model.modules() if hasattr(m, "up"))):
        module.register_forward_hook(lambda _, __, out: held.append((out, out.detach().clone())))
    y = model(tokens)
    assert held and all(torch.equal(now, was) for now, was in held)
    assert torch.equal(model(tokens), y)


def test_dropout_is_on_the_scores_alone(tokens):
    """A dropped score is 0, not a weight of 0: with all scores 0 nothing is random."""
    model = fused(config=FusionConfig(("a", "b"), dropout=0.5)).train()
    torch.manual_seed(1)
    first = model(tokens)
    assert not torch.equal(model(tokens), first)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.query.weight.zero_()
            layer.mlp.query.bias.zero_()
    assert torch.equal(model(tokens), model(tokens))


def test_complaint_54_and_74_a_loaded_fusion_is_applied(tokens, tmp_path):
    """adapters #54, #74: the weights of a saved fusion were loaded, and then nothing used them."""
    model, fresh = fused(), encoder()
    for name in ("a", "b", "f"):
        save_adapter(model, tmp_path / name, name)
    expected = model(tokens)
    for name in ("a", "b"):
        load_adapter(fresh, tmp_path / name, name)
    activate(fresh, "a", "b")
    unfused = fresh(tokens)
    load_adapter(fresh, tmp_path / "f", "f")
    assert torch.equal(fresh(tokens), expected)
    assert not torch.allclose(expected, unfused, atol=0.01)
    with safe_open(tmp_path / "f" / "adapter_model.safetensors", framework="pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert sum(t.numel() for t in saved.values()) == 2 * (3 * D * D + 2 * D)
    assert not any("down" in key or "up." in key for key in saved)


def test_loading_without_the_adapters_is_one_clear_error(tokens, tmp_path):
    save_adapter(fused(), tmp_path / "f", "f")
    fresh = encoder()
    before = fresh(tokens)
    with pytest.raises(ValueError) as caught:
        load_adapter(fresh, tmp_path / "f")
    assert "there is no adapter 'a' on the model (it has none): tune or load it first" in str(caught.value)
    assert "there is no adapter 'b' on the model" in str(caught.value)
    assert torch.equal(fresh(tokens), before) and not tunings_of(fresh)


def test_loading_on_other_adapters_of_those_names_is_refused(tokens, tmp_path):
    save_adapter(fused(), tmp_path / "f", "f")
    other = with_adapters(encoder())
    randomize(tunings_of(other)["a"].parameters().values())
    before = other(tokens)
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        load_adapter(other, tmp_path / "f", "f")
    assert torch.equal(other(tokens), before)


def test_unloading_gives_the_adapters_back_as_they_were(tokens):
    model = with_adapters(encoder())
    before, names = model(tokens), [name for name, _ in model.named_modules()]
    tune(model, BOTH, "f")
    randomize(trainable(model))
    assert not torch.allclose(model(tokens), before, atol=0.01)
    unload(model, "f")
    assert torch.equal(model(tokens), before) and [name for name, _ in model.named_modules()] == names
    unload(model)
    assert torch.equal(model(tokens), encoder()(tokens))


def test_switching_takes_the_fusion_apart_and_puts_it_together_again(tokens):
    model = fused()
    expected = model(tokens)
    alone = encoder()
    tune(alone, BottleneckConfig("pfeiffer", size=2))
    for name, parameter in tunings_of(alone)["default"].parameters().items():
        parameter.data.copy_(tunings_of(model)["a"].parameters()[name])
    activate(model, "a")
    assert torch.equal(model(tokens), alone(tokens))
    activate(model)
    assert torch.equal(model(tokens), encoder()(tokens))
    activate(model, "a", "b", "f", train=("f",))
    assert torch.equal(model(tokens), expected)


def test_an_adapter_below_the_fused_ones_is_read_through(tokens):
    """c, then a and b side by side on what c has made."""
    model = with_adapters(encoder(), names="cab")
    tune(model, BOTH, "f")
    assert torch.isfinite(model(tokens)).all()
    adapters = [layer.mlp._fused() for layer in model.layers]
    assert [[a.adapter for a in chain] + [below.adapter] for chain, below in adapters] == [["a", "b", "c"]] * 2


def test_the_order_of_the_names_is_the_users(tokens):
    """Attention over a set: the names' order changes nothing."""
    model, turned = fused(), with_adapters(encoder())
    tune(turned, FusionConfig(("b", "a")), "f")
    for name, parameter in tunings_of(turned)["f"].parameters().items():
        parameter.data.copy_(tunings_of(model)["f"].parameters()[name])
    torch.testing.assert_close(turned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_a_fusion_without_one_of_its_adapters_says_so(tokens):
    model = fused()
    activate(model, "a", "f")
    with pytest.raises(ValueError, match="reads the adapters 'a', 'b', and directly below it stand 'a': activate all"):
        model(tokens)
    activate(model, "f")
    with pytest.raises(ValueError, match="directly below it stand none"):
        model(tokens)


def test_deepcopy_and_checkpointing_change_nothing(tokens):
    model = fused().train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing = True
    gradients = []
    for each in (model, twin):
        each(tokens).pow(3).sum().backward()
        gradients.append([p.grad for p in trainable(each)])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_float32_fusion_of_a_bfloat16_base(tokens):
    model = with_adapters(encoder().bfloat16())
    tune(model, BOTH, "f")
    randomize(trainable(model))
    assert all(p.dtype == torch.float32 for p in trainable(model))
    y = model(tokens)
    assert y.dtype == torch.bfloat16
    assert (y.float() - copy.deepcopy(model).float()(tokens)).norm() < 0.05 * y.float().norm()  # 8 bits


def test_merge_says_why_it_cannot():
    with pytest.raises(CannotMerge, match=r"depends on its input|not linear"):
        merge(fused())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"adapters": ("a",)}, r"adapters: at least two names, each once, not \('a',\)"),
        ({"adapters": ()}, r"adapters: at least two names, each once, not \(\)"),
        ({"adapters": ("a", "a")}, "at least two names, each once"),
        ({"adapters": "ab"}, "adapters: a tuple of names, not the text 'ab'"),
        ({"adapters": ("a", "b"), "dropout": -0.1}, r"dropout: a probability in \[0, 1\), not -0.1"),
        ({"adapters": ("a", "b"), "regularization": -1}, "regularization: a number, at least 0, not -1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FusionConfig(**fields)


def lora_and_bottleneck():
    model = encoder()
    tune(model, LoraConfig(rank=2), "a")
    activate(model)
    tune(model, BottleneckConfig("parallel"), "b")
    activate(model, "a", "b")
    return model


def on_top():
    model = encoder()
    for name in "ab":
        tune(model, BottleneckConfig("pfeiffer"), name)
    return model


def inactive():
    model = with_adapters(encoder())
    activate(model, "a")
    return model


def apart(fields):
    model = with_adapters(encoder(), names="a")
    activate(model)
    tune(model, BottleneckConfig(**{"kind": "pfeiffer"} | fields), "b")
    activate(model, "a", "b")
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (encoder, r"there is no adapter 'a' on the model \(it has none\)(.|\n)*'b'"),
        (lora_and_bottleneck, "'a' is a lora(.|\n)*'b' is a parallel one: a fusion is of Houlsby's or Pfeiffer's"),
        (on_top, "'b' was trained on top of 'a', and side by side it would read something else"),
        (inactive, "'b' is not active; activate all of 'a', 'b' first"),
        (lambda: apart({"leave_out": (0,)}), "they stand at different places"),
        (lambda: apart({"kind": "houlsby"}), "they stand at different places"),
        (
            lambda: apart({"kind": "houlsby", "targets": ("layers.0.mlp", "layers.1.mlp"), "width": D}),
            "they read different things at one place: give all the same kind",
        ),
        (lambda: with_adapters(encoder(), names="abc"), "other adapters stand on them .c.: activate fewer"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_the_model_stays(make, message, tokens):
    model = make()
    before, names = model(tokens), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        tune(model, BOTH, "f")
    assert torch.equal(model(tokens), before) and [name for name, _ in model.named_modules()] == names
    assert not any(isinstance(module, Fusion) for module in model.modules())
