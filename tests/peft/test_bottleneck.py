"""Bottleneck adapters: their papers' formulas by hand in float64, and inside models of other libraries."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.layers import MLP, Attention, Block, LayerNorm
from minillm.models import ModelConfig, build
from minillm.peft import CannotMerge, load_adapter, merge, num_parameters, save_adapter, tune, unload
from minillm.peft.bottleneck import Bottleneck
from minillm.peft.bottleneck_config import BottleneckConfig
from minillm.peft.names import original_parameters
from minillm.peft.switch import activate

D, HEADS, KINDS = 12, 3, ("houlsby", "pfeiffer", "parallel")
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 keeps 16 digits; a block's sums are of tens of terms of size 1


def block_model(norm_first, cross=False):
    """A model of one block, named "0", all of its weights random."""
    torch.manual_seed(0)
    attention = [Attention(D, HEADS, bias=True) for _ in range(1 + cross)]
    block = Block(
        attention[0],
        MLP(D, 20),
        lambda: LayerNorm(D),
        cross_attn=attention[1] if cross else None,
        norm_first=norm_first,
    )
    model = nn.ModuleList([block]).double()
    randomize(model.parameters())
    return model


def randomize(parameters, std=0.4):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std)


def encoder(norm_first, **fields):
    fields = {"hidden_size": D, "num_layers": 2, "num_heads": HEADS, "norm_first": norm_first} | fields
    return build(ModelConfig(kind="encoder", vocab_size=31, max_positions=32, norm="layer", init_std=0.2, **fields))


def encoder_decoder(**fields):
    return build(
        ModelConfig(
            kind="encoder_decoder",
            vocab_size=31,
            hidden_size=D,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=HEADS,
            max_positions=32,
            **fields,
        )
    )


def by_hand(w, x, memory, kind, norm_first, act, scaling, cross):
    """The block "0" with its adapters, from its weights `w` by name; every product and sum written out here."""

    def linear(name, h):
        return h @ w[f"0.{name}.weight"].T + w[f"0.{name}.bias"]

    def norm(name, h):
        centred = h - h.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return w[f"0.{name}.weight"] * centred / std + w[f"0.{name}.bias"]

    def attention(name, h, source):
        out = []
        q, k, v = (linear(f"{name}.{p}_proj", t) for p, t in (("q", h), ("k", source), ("v", source)))
        for i in range(HEADS):
            part = slice(i * D // HEADS, (i + 1) * D // HEADS)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(D // HEADS)
            out.append(scores.softmax(-1) @ v[..., part])
        return linear(f"{name}.o_proj", torch.cat(out, -1))

    def f(name, h):
        return scaling * linear(f"{name}.up", act(linear(f"{name}.down", h)))

    def mlp(h):
        return linear("mlp.down_proj", F.gelu(linear("mlp.up_proj", h)))

    x_in = x
    s = attention("self_attn", *([norm("attn_norm", x)] * 2 if norm_first else [x, x]))
    s = s + f("self_attn", s) if kind == "houlsby" else s
    x = x_in + s if norm_first else norm("attn_norm", x_in + s)
    if memory is not None:
        x_in = x
        s = attention("cross_attn", norm("cross_attn_norm", x) if norm_first else x, memory)
        s = s + f("cross_attn", s) if cross else s
        x = x_in + s if norm_first else norm("cross_attn_norm", x_in + s)
    x_in, read = x, norm("mlp_norm", x) if norm_first else x
    s = mlp(read)
    if kind == "parallel":
        return x_in + s + f("mlp", read) if norm_first else norm("mlp_norm", x_in + s + f("mlp", read))
    if norm_first:
        return x_in + s + f("mlp", s)
    if kind == "houlsby":
        return norm("mlp_norm", x_in + s + f("mlp", s))
    r = s
    h = norm("mlp_norm", s + x_in)
    a = f("mlp", h) + r
    return norm("mlp_norm", a + x_in)  # the same frozen norm once more


PLACES = [
    (kind, norm_first, cross) for kind, norm_first in itertools.product(KINDS, (True, False)) for cross in (None, False)
] + [("houlsby", True, True), ("houlsby", False, True)]
ACTS = {"houlsby": F.silu, "pfeiffer": F.relu, "parallel": F.relu}


@pytest.mark.parametrize("kind, norm_first, cross", PLACES)
def test_a_block_is_the_formula_by_hand_and_so_are_all_gradients(kind, norm_first, cross):
    """cross: None without cross-attention, else whether an adapter follows it."""
    model = block_model(norm_first, cross=cross is not None)
    tune(model, BottleneckConfig(kind, reduction=5, cross_attention=bool(cross)))
    own = {name: p for name, p in original_parameters(model).items() if p.requires_grad}
    randomize(own.values())
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    memory = None if cross is None else torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    w = {name: p.detach().clone().requires_grad_() for name, p in original_parameters(model).items()}
    scaling = 4.0 if kind == "parallel" else 1.0
    expected = by_hand(w, x, memory, kind, norm_first, ACTS[kind], scaling, cross)
    y = model[0](x, memory=memory)
    torch.testing.assert_close(y, expected, **EXACT)
    inputs = [x] if memory is None else [x, memory]
    pull = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, [*inputs, *(w[name] for name in own)], pull)
    ours = torch.autograd.grad(y, [*inputs, *own.values()], pull)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_identity_start_is_exact(kind, norm_first):
    model, tokens = encoder(norm_first), torch.randint(0, 31, (2, 7))
    before = model(tokens)
    config = BottleneckConfig(kind)
    tune(model, config)
    assert torch.equal(model(tokens), before)
    assert config.start == ""


@pytest.mark.parametrize("init", ["bert", "houlsby"])
def test_the_papers_starts_are_near_the_identity_and_say_so(init):
    model, tokens = encoder(False), torch.randint(0, 31, (2, 7))
    before = model(tokens)
    config = BottleneckConfig(init=init)
    tune(model, config)
    assert 0 < (model(tokens) - before).abs().max() < 0.1
    assert config.start == f"init='{init}' starts near the identity, not at it"
    assert type(config).start == ""


def test_the_starts_are_drawn_from_the_stated_distributions():
    linear = nn.Linear(400, 300)
    adapters = {init: Bottleneck(linear, (300, 250, 300)) for init in ("identity", "bert", "houlsby")}
    for init, adapter in adapters.items():
        adapter.reset_parameters(init)
        assert not adapter.down.bias.any() and not adapter.up.bias.any()
    bert, houlsby, identity = adapters["bert"], adapters["houlsby"], adapters["identity"]
    for weight in (bert.down.weight, bert.up.weight):  # 75,000 draws: the std is within 1 % (four sigma)
        assert weight.detach().std() == pytest.approx(0.02, rel=0.011) and weight.abs().max() > 0.06
    for weight in (houlsby.down.weight, houlsby.up.weight):  # a normal cut at 2 sigma has 0.8796 of its std
        assert weight.detach().std() == pytest.approx(0.8796e-2, rel=0.011) and weight.abs().max() <= 0.02
    assert not identity.up.weight.any()
    bound = 1 / math.sqrt(300)  # kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < identity.down.weight.abs().max() <= bound


def test_counts_are_the_formula():
    def count(config, model):
        report = tune(copy.deepcopy(model), config)
        assert num_parameters(config, model) == report.trainable
        return report.trainable

    model = encoder(False)  # D = 12, 2 blocks
    assert count(BottleneckConfig("houlsby", reduction=5), model) == 2 * 2 * (2 * 2 * D + 2 + D)
    assert count(BottleneckConfig("pfeiffer", reduction=5), model) == 2 * (2 * 2 * D + 2 + D)
    assert count(BottleneckConfig("parallel"), model) == 2 * (2 * 6 * D + 6 + D)
    assert count(BottleneckConfig("pfeiffer", reduction=3.3), model) == 2 * (2 * 3 * D + 3 + D)  # 12 / 3.3 = 3.6
    assert count(BottleneckConfig("pfeiffer", size=7), model) == 2 * (2 * 7 * D + 7 + D)
    assert count(BottleneckConfig("houlsby", leave_out=(0,)), model) == 2 * (2 * D + 1 + D)


def test_a_bottleneck_is_never_less_than_one_wide():
    model = encoder(True)
    tune(model, BottleneckConfig("pfeiffer", reduction=16))  # 12 // 16 = 0
    assert model.layers[0].mlp.down.out_features == 1


def test_an_encoder_decoder_has_adapters_after_cross_attention_if_asked():
    one = 2 * 3 * D + 3 + D
    plain, crossed = (BottleneckConfig(size=3, cross_attention=cross) for cross in (False, True))
    assert num_parameters(plain, encoder_decoder()) == (2 + 3) * 2 * one
    assert num_parameters(crossed, encoder_decoder()) == ((2 + 3) * 2 + 3) * one
    model = encoder_decoder()
    tune(model, crossed)
    around = [name for name, m in model.decoder.layers[1].named_children() if isinstance(m, Bottleneck)]
    assert sorted(around) == ["cross_attn", "mlp", "self_attn"]


def test_blocks_are_left_out_by_their_number_through_the_model():
    model = encoder_decoder()
    modules = tune(model, BottleneckConfig("pfeiffer", leave_out=(0, 2, 4))).modules  # 0, 1 encoder; 2, 3, 4 decoder
    assert modules == ("encoder.layers.1.mlp", "decoder.layers.1.mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_reads_what_the_first_has_made(kind):
    """In Pfeiffer's the second residual is the first adapter's output: a_2 = f_2(norm(a_1 + x)) + a_1."""
    model = block_model(norm_first=False)
    block = copy.deepcopy(model[0])
    for name in ("a", "b"):
        tune(model, BottleneckConfig(kind, size=3), name)
    activate(model, "a", "b")
    randomize(p for p in model.parameters() if p.requires_grad)
    w = original_parameters(model)
    x = torch.randn(2, 5, D, dtype=torch.float64)

    def f(name, place, h):
        down, up = ((w[f"0.{place}.{p}.weight@{name}"], w[f"0.{place}.{p}.bias@{name}"]) for p in ("down", "up"))
        return {"parallel": 4.0}.get(kind, 1.0) * F.linear(ACTS[kind](F.linear(h, *down)), *up)

    s = block.self_attn(x)
    for name in ("a", "b") if kind == "houlsby" else ():
        s = s + f(name, "self_attn", s)
    y = block.attn_norm(x + s)
    a = block.mlp(y)
    for name in ("a", "b"):
        read = {"houlsby": a, "pfeiffer": block.mlp_norm(a + y), "parallel": y}[kind]
        a = a + f(name, "mlp", read)
    torch.testing.assert_close(model[0](x), block.mlp_norm(y + a), **EXACT)


@pytest.mark.parametrize(
    "kind, norm_first, times", [("pfeiffer", False, 2), ("pfeiffer", True, 1), ("houlsby", False, 1)]
)
def test_toy_mistake_the_frozen_norm_is_applied_once(kind, norm_first, times):
    model, calls = block_model(norm_first), []
    tune(model, BottleneckConfig(kind))
    model[0].mlp_norm.register_forward_hook(lambda *_: calls.append(1))
    model[0](torch.randn(1, 3, D, dtype=torch.float64)).sum().backward()
    assert len(calls) == times
    assert all(p.grad is None for p in model[0].mlp_norm.parameters())


def test_toy_mistake_dropout_on_the_base_path():
    model = block_model(norm_first=True).train()
    tune(model, BottleneckConfig("pfeiffer", dropout=0.5))
    adapter, x = model[0].mlp, torch.randn(4, 9, D, dtype=torch.float64)
    assert torch.equal(adapter(x), adapter.base(x))  # Up = 0: nothing is there to be dropped
    randomize(adapter.up.parameters())
    update = adapter.update(adapter.base(x))
    added = adapter(x) - adapter.base(x)
    kept = added.abs() > 1e-9
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(added[kept], 2 * update[kept], rtol=1e-9, atol=1e-9)


def test_merge_says_why_it_cannot():
    model = encoder(True)
    tune(model, BottleneckConfig())
    with pytest.raises(CannotMerge, match="a bottleneck adapter is not linear"):
        merge(model)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    model, tokens = encoder(False).train(), torch.randint(0, 31, (2, 7))
    tune(model, BottleneckConfig(kind))
    own = [p for p in model.parameters() if p.requires_grad]
    randomize(own)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        gradients.append(torch.autograd.grad(model(tokens).pow(3).sum(), own))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_deep_copy_reads_through_its_own_norm():
    model, tokens = encoder(False), torch.randint(0, 31, (2, 7))
    tune(model, BottleneckConfig("pfeiffer"))
    randomize(p for p in model.parameters() if p.requires_grad)
    before, twin = model(tokens), copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[1].mlp_norm.weight.mul_(3)
        model.layers[1].mlp_norm.weight.mul_(1)
    assert torch.equal(model(tokens), before)
    with torch.no_grad():
        model.layers[1].mlp_norm.weight.mul_(3)
    assert not torch.equal(model(tokens), before) and torch.equal(twin(tokens), model(tokens))


def test_the_adapter_reads_through_the_norm_that_the_block_has_now():
    """A norm that is replaced after tuning, such as by an adapter of its own, is used both times."""
    model, x = block_model(norm_first=False), torch.randn(2, 5, D, dtype=torch.float64)
    tune(model, BottleneckConfig("pfeiffer"))
    randomize(model[0].mlp.up.parameters())
    model[0].mlp_norm = nn.Identity()
    block, adapter = model[0], model[0].mlp
    y = block.attn_norm(x + block.self_attn(x))
    s = adapter.base(y)
    torch.testing.assert_close(block(x), y + s + adapter.update(y + s), **EXACT)


def test_float32_adapters_serve_a_bfloat16_base():
    model, tokens = encoder(False).bfloat16(), torch.randint(0, 31, (2, 7))
    tune(model, BottleneckConfig("pfeiffer"))
    own = [p for p in model.parameters() if p.requires_grad]
    randomize(own)
    assert all(p.dtype == torch.float32 for p in own)
    y = model(tokens)
    wide = copy.deepcopy(model).float()
    assert y.dtype == torch.bfloat16
    assert (y.float() - wide(tokens)).norm() < 0.05 * y.float().norm()  # bfloat16 keeps 8 bits
    y.float().pow(3).sum().backward()
    assert all(p.grad.count_nonzero() for p in own)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, tokens = encoder(False), torch.randint(0, 31, (2, 7))
    tune(model, BottleneckConfig(kind))
    randomize(p for p in model.parameters() if p.requires_grad)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(tokens).float() - exact).norm() < 0.05 * exact.norm()


@pytest.fixture
def bert():
    """A random BertModel of the Hub's library, in float64."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=31,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=20,
        max_position_embeddings=32,
        pad_token_id=None,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False).double().eval()


def test_complaint_11_bottleneck_adapters_for_a_transformers_bert(bert, tmp_path):
    """peft was asked for them in 2023 and has none (peft #244, #2654, #2657). "output.dense" ends both sublayers."""
    fresh, twin, tokens = copy.deepcopy(bert), copy.deepcopy(bert), torch.randint(0, 31, (2, 7))
    before = bert(tokens).last_hidden_state
    config = BottleneckConfig("houlsby", size=3, targets=("output.dense",))
    report = tune(bert, config)
    ends = ("attention.output.dense", "output.dense")
    assert report.modules == tuple(f"encoder.layer.{i}.{end}" for i in range(2) for end in ends)
    assert report.trainable == 2 * 2 * (2 * 3 * D + 3 + D)
    assert torch.equal(bert(tokens).last_hidden_state, before)
    own = {name: p for name, p in original_parameters(bert).items() if p.requires_grad}
    randomize(own.values())

    def adapted(name):  # as a hook on an untouched model: the formula alone
        down, up = ((own[f"{name}.{part}.weight"], own[f"{name}.{part}.bias"]) for part in ("down", "up"))
        return lambda module, inputs, s: s + F.linear(F.silu(F.linear(s, *down)), *up)

    for name in report.modules:
        twin.get_submodule(name).register_forward_hook(adapted(name))
    y, expected = bert(tokens).last_hidden_state, twin(tokens).last_hidden_state
    torch.testing.assert_close(y, expected, **EXACT)
    ours, theirs = (torch.autograd.grad(out.pow(3).sum(), list(own.values())) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    save_adapter(bert, tmp_path / "a")
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(tokens).last_hidden_state, y)
    unload(bert)
    assert torch.equal(bert(tokens).last_hidden_state, before)
    assert [name for name, _ in bert.named_modules()] == [name for name, _ in twin.named_modules()]


def test_width_lets_other_modules_be_targets(bert):
    """After BERT's own dropouts, where Houlsby's stand; these have no weights to take a dtype from."""
    twin, tokens = copy.deepcopy(bert), torch.randint(0, 31, (2, 7))
    config = {"size": 3, "init": "bert"}
    torch.manual_seed(5)
    tune(bert, BottleneckConfig(targets=("output.dropout",), width=D, **config))
    assert bert.encoder.layer[0].output.dropout.down.weight.dtype == torch.float64
    torch.manual_seed(5)
    tune(twin, BottleneckConfig(targets=("output.dense",), **config))
    assert torch.equal(bert(tokens).last_hidden_state, twin(tokens).last_hidden_state)  # no dropout in eval mode


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def test_the_head_of_a_cnn():
    model, x = cnn(), torch.randn(2, 1, 8, 8)
    before = model(x)
    assert tune(model, BottleneckConfig(reduction=3, targets=("3",))).trainable == 2 * 3 * 10 + 3 + 10
    assert torch.equal(model(x), before)


def test_behind_layers_that_change_the_shape():
    """A Flatten and an embedding: what they take has another shape, or other numbers, than what the adapter reads."""
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(30, 2))
    for target, width in (("0", 6), ("1", 30)):
        twin, x = copy.deepcopy(model), torch.randint(0, 7, (3, 5))
        tune(twin, BottleneckConfig(targets=(target,), width=width, init="bert"))
        adapter = twin.get_submodule(target)
        s = model[: int(target) + 1](x)
        torch.testing.assert_close(twin(x), model[int(target) + 1 :](s + adapter.update(s)))


def test_parallel_beside_a_layer_that_changes_the_width():
    model, x = cnn(), torch.randn(2, 1, 8, 8)
    report = tune(model, BottleneckConfig("parallel", size=5, targets=("3",)))
    assert report.trainable == 5 * (144 + 10) + 5 + 10
    randomize(model[3].up.parameters())
    h = model[:3](x)
    update = 4.0 * model[3].up(model[3].down(h).relu())
    torch.testing.assert_close(model[3](h), model[3].base(h) + update)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_a_module_that_returns_more_than_a_tensor_is_refused():
    model = nn.Sequential(Pair())
    tune(model, BottleneckConfig(targets=("0",), width=4))
    with pytest.raises(ValueError, match="stands around a Pair, which returns a tuple: give as target a module that"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "houlsbi"}, "kind='houlsbi': did you mean houlsby?"),
        ({"init": "zero"}, "init='zero': did you mean one of identity, houlsby, bert?"),
        ({"activation": "relo"}, "activation='relo': did you mean relu"),
        ({"reduction": 0}, "reduction=0: a number above 0"),
        ({"scaling": float("inf")}, "scaling=inf: a number above 0"),
        ({"size": 2.5}, "size=2.5: a whole number above 0"),
        ({"size": True}, "size=True: a whole number above 0"),
        ({"width": 0, "targets": ("a",)}, "width=0: a whole number above 0"),
        ({"dropout": 1.0}, r"dropout: a probability in \[0, 1\), not 1.0"),
        ({"cross_attention": "yes"}, "cross_attention: True or False, not 'yes'"),
        ({"leave_out": (-1,)}, r"leave_out: numbers of blocks from 0, such as \(0, 1\), not \(-1,\)"),
        ({"leave_out": 1}, "leave_out: numbers of blocks from 0"),
        ({"targets": "dense"}, r"targets: a tuple of names, not the text 'dense'; write \('dense',\)"),
        ({"trainable": 3}, "trainable: a tuple of names"),
        ({"size": 4, "reduction": 4}, "size and reduction both say how wide the bottleneck is: give one"),
        ({"kind": "pfeiffer", "cross_attention": True}, "cross_attention is for kind='houlsby'"),
        ({"kind": "pfeiffer", "targets": ("a",)}, "kind='pfeiffer' reads a block's norm, and targets name no norms"),
        ({"targets": ("a",), "leave_out": (0,)}, "leave_out and cross_attention are about blocks"),
        ({"width": 8}, "width is for targets that are no linear layers"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)


def test_all_bad_fields_are_in_one_error():
    with pytest.raises(ValueError, match=r"BottleneckConfig:\n(.|\n)*kind(.|\n)*size(.|\n)*dropout"):
        BottleneckConfig("best", size=0, dropout=2)


class Named(nn.Module):
    """A module with a child of the name that an adapter's has."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, x):
        return self.down(x)


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (cnn, {}, "it has no block of ours; name its layers in `targets`"),
        (cnn, {"targets": ("0",)}, "0: is a Conv2d, not a linear layer"),
        (cnn, {"targets": ("9",)}, "'9' matches no module"),
        (lambda: nn.Sequential(Named()), {"targets": ("0",), "width": 4}, "0: holds a module 'down' itself"),
        (lambda: encoder(True), {"leave_out": (1, 2, 7)}, r"leave_out=\[2, 7\]: its 2 blocks have the numbers 0..1"),
        (lambda: encoder(True), {"leave_out": (0, 1)}, "leave_out leaves no block"),
        (lambda: encoder(True), {"cross_attention": True}, "none of its blocks that get adapters has any"),
        (encoder_decoder, {"cross_attention": True, "leave_out": (2, 3, 4)}, "none of its blocks that get adapters"),
        (lambda: encoder(True), {"trainable": ("haed",)}, "'haed' matches no module"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(make, fields, message):
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        tune(model, BottleneckConfig(**fields))
    assert [name for name, _ in model.named_modules()] == before
