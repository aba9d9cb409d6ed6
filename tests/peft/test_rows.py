"""Mixed batches: every row gets what it would get alone (outputs, tokens, gradients), and the model stays whole."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from minillm.generation import beam_search, generate_tokens
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.ops import use_backend
from minillm.peft import LoraConfig, activate, merge, save_adapter, tune, tunings_of, unmerge
from minillm.peft.bank import LoRABank
from minillm.peft.ia3 import Ia3Config
from minillm.peft.mixed_batch import rows
from minillm.peft.prompt import PromptConfig
from minillm.peft.qlora import QLoraConfig

ADAPTERS = {  # other targets, ranks, scales; "up" is in layers where the others are not
    "a": LoraConfig(rank=3, alpha=7.0, targets=("q_proj", "v_proj")),
    "b": LoraConfig(rank=1, alpha=2.0, targets=("all-linear",), rslora=True),
    "up": LoraConfig(rank=5, alpha=3.0, targets=("mlp.up_proj", "k_proj"), rank_pattern={"k_proj": 2}),
}
NAMES = ["a", None, "up", "b", "a"]
SIZES = dict(vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=32, init_std=0.3)


def add(model, **configs):
    """Put adapters on the model, each trained alone on the base, and leave all of them inactive."""
    generator = torch.Generator().manual_seed(3)
    for name, config in configs.items():
        if tunings_of(model):
            activate(model)
        tune(model, config, name)
        with torch.no_grad():
            for parameter in tunings_of(model)[name].parameters().values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise)
    activate(model)
    return model


def alone(model, names, run):
    """`run(i)` for each row i with its adapter active and nothing else: the truth."""
    outputs = []
    for i, name in enumerate(names):
        activate(model, *([] if name is None else [name]))
        outputs.append(run(i))
    activate(model)
    return outputs


def state(model):
    """Everything that a block must leave as it was: modules, tensors, what trains, modes, active adapters."""
    modules = {path: (id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)}
    own = {(t.name, n): p for t in tunings_of(model).values() for n, p in t.parameters().items()}
    parameters = {**dict(model.named_parameters()), **own}
    values = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in parameters.items()}
    return modules, values, [(t.name, t.active, t.trains) for t in tunings_of(model).values()]


def assert_same(before, after):
    assert before[0] == after[0] and before[2] == after[2] and before[1].keys() == after[1].keys()
    for name, (identity, required, value) in before[1].items():
        assert after[1][name][:2] == (identity, required), name
        assert torch.equal(after[1][name][2], value), name


@pytest.fixture
def model():
    return add(build(ModelConfig(**SIZES)).double(), **ADAPTERS)


@pytest.fixture
def tokens():
    return torch.randint(0, 41, (5, 7))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    "names",
    [NAMES, ["b", "b", "b", "b", "b"], [None] * 5, ["up", "b", "a", None, "b"]],
    ids=["-".join(map(str, NAMES)), "one", "none", "other order"],
)
def test_each_row_is_what_it_is_alone(model, tokens, names, gradients, backend):
    truth = torch.cat(alone(model, names, lambda i: model(tokens[i : i + 1])))
    with rows(model, names), torch.set_grad_enabled(gradients), use_backend(backend):
        torch.testing.assert_close(model(tokens), truth.detach() if not gradients else truth)


def test_a_row_without_adapter_is_the_base_to_the_last_bit(model, tokens):
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            base = model(tokens)
            with rows(model, NAMES):
                assert torch.equal(model(tokens)[1], base[1])


def test_batch_of_one(model, tokens):
    for name in ("a", None):
        (truth,) = alone(model, [name], lambda i: model(tokens[:1]))
        with rows(model, [name]):
            torch.testing.assert_close(model(tokens[:1]), truth)


def test_gradients_reach_each_adapter_from_its_own_rows_and_no_other_parameter(model, tokens):
    names = ["a", None, "b", "b", "a"]  # not "up"
    weights = torch.randn(5, 7, 41, dtype=torch.float64)
    wanted = {(name, leaf): p for name in ADAPTERS for leaf, p in tunings_of(model)[name].parameters().items()}

    def gradients():
        found = {key: None if p.grad is None else p.grad.clone() for key, p in wanted.items()}
        model.zero_grad()
        for parameter in wanted.values():
            parameter.grad = None
        return found

    alone(model, names, lambda i: names[i] and (model(tokens[i : i + 1]) * weights[i]).sum().backward())
    truth = gradients()
    with rows(model, names):
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        assert trains == {id(p) for (name, _), p in wanted.items() if name in ("a", "b")}
        assert not any(p.requires_grad for (name, _), p in wanted.items() if name == "up")
        (model(tokens) * weights).sum().backward()
        assert all(p.grad is None for p in model.parameters() if id(p) not in trains)
    ours = gradients()
    assert {name for (name, _), grad in ours.items() if grad is not None} == {"a", "b"}
    for key, grad in ours.items():
        if grad is not None:
            assert grad.count_nonzero()
            torch.testing.assert_close(grad, truth[key])


def test_training_inside_the_block_lowers_each_rows_loss_and_moves_no_one_else(model, tokens):
    before = state(model)[1]
    with rows(model, ["a", "b", "a", "b", None]):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(6):
            logits = model(tokens)[:, :-1]
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
    assert (losses[-1][:4] < losses[0][:4]).all()
    assert torch.equal(losses[-1][4], losses[0][4])  # the row without an adapter
    for name, (_, _, value) in state(model)[1].items():
        moves = isinstance(name, tuple) and name[0] in ("a", "b")
        assert torch.equal(value, before[name][2]) is not moves, name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_recomputes_with_the_same_rows(model, tokens, checkpointing):
    model.train()
    truth = None
    for on in (False, checkpointing):
        model.gradient_checkpointing = on
        with rows(model, NAMES):
            own = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(model(tokens).square().sum(), own)
        truth = truth or grads
        torch.testing.assert_close(grads, truth, rtol=0, atol=0)


def test_backward_outside_the_block_with_checkpointing_is_an_error_not_a_wrong_gradient(model, tokens):
    model.train().gradient_checkpointing = True
    with rows(model, NAMES):
        loss = model(tokens).square().sum()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_backward_outside_the_block_is_refused_where_gradients_would_be_lost(model, tokens):
    """torch gives a parameter that requires no gradient any more none, without a word."""
    with rows(model, NAMES):
        loss = model(tokens).square().sum()
    with pytest.raises(ValueError, match=r"backward\(\) ran after rows\(\) was left.*call it inside"):
        loss.backward()


def test_backward_outside_the_block_where_the_adapters_train_on(model, tokens):
    activate(model, "a", "up", "b")
    with rows(model, NAMES):
        own = [p for p in model.parameters() if p.requires_grad]
        inside = torch.autograd.grad(model(tokens).square().sum(), own)
        loss = model(tokens).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, own), inside, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_generated_tokens_are_those_of_each_row_alone(model, tokens, padded):
    mask = torch.arange(7) >= torch.tensor([0, 3, 1, 6, 0])[:, None] if padded else None

    def run(i):
        its = None if mask is None else mask[i : i + 1]
        return generate_tokens(model, tokens[i : i + 1], max_new_tokens=12, mask=its)

    truth = torch.cat(alone(model, NAMES, run))
    assert len({tuple(row) for row in truth[:, -4:].tolist()}) > 1
    with rows(model, NAMES):
        assert torch.equal(generate_tokens(model, tokens, max_new_tokens=12, mask=mask), truth)


def test_beam_search_repeats_each_row(model, tokens):
    options = dict(num_beams=3, num_return=2, max_new_tokens=6, stop_ids=[5])
    truth = alone(model, NAMES, lambda i: beam_search(model, tokens[i : i + 1], **options))
    with rows(model, NAMES, repeats=3):
        found = beam_search(model, tokens, **options)
    for i, alone_ in enumerate(truth):
        length = alone_.tokens.shape[-1]
        torch.testing.assert_close(found.scores[i], alone_.scores[0])
        assert torch.equal(found.tokens[i, :, :length], alone_.tokens[0]) and not found.tokens[i, :, length:].any()
    message = r"5 rows, but a layer's input \(15, 1, 16\) has 15.*repeats="
    with pytest.raises(ValueError, match=message), rows(model, NAMES):
        beam_search(model, tokens, **options)


def test_encoder_decoder(tokens):
    model = build(ModelConfig(kind="encoder_decoder", num_decoder_layers=2, decoder_start_id=1, **SIZES)).double()
    add(model, **ADAPTERS)
    source, start = tokens.flip(1), torch.full((5, 1), 1)
    truth = torch.cat(alone(model, NAMES, lambda i: model(source[i : i + 1], tokens[i : i + 1])))
    written = alone(
        model, NAMES, lambda i: generate_tokens(model.condition(source[i : i + 1]), start[:1], max_new_tokens=8)
    )
    with rows(model, NAMES):
        torch.testing.assert_close(model(source, tokens), truth)
        found = generate_tokens(model.condition(source), start, max_new_tokens=8)
        assert torch.equal(found, torch.cat(written))


def test_encoder_with_an_adapted_head_on_one_vector_for_each_row(tokens):
    """A classifier's layers read (B, D), not (B, T, D)."""
    config = ModelConfig(kind="encoder", **SIZES)
    model = build_with_head(config, HeadConfig(num_labels=3, dropout=0.0)).double()
    head = [name for name, module in model.named_modules() if type(module) is nn.Linear and "layers" not in name]
    add(model, **ADAPTERS, head=LoraConfig(rank=2, alpha=3.0, targets=(*head, "q_proj")))
    names = ["head", None, "up", "b", "head"]
    truth = torch.cat(alone(model, names, lambda i: model(tokens[i : i + 1])))
    with rows(model, names):
        torch.testing.assert_close(model(tokens), truth)


def test_multiple_choice_repeats_each_row_by_its_choices(tokens):
    config = ModelConfig(kind="encoder", **SIZES)
    model = build_with_head(config, HeadConfig(task="choice", dropout=0.0)).double()
    add(model, a=ADAPTERS["a"], b=ADAPTERS["b"])
    choices = torch.stack([tokens[:2], tokens[2:4], tokens[1:3]], dim=1)  # (2, 3, T)
    truth = torch.cat(alone(model, ["a", "b"], lambda i: model(choices[i : i + 1])))
    with rows(model, ["a", "b"], repeats=3):
        torch.testing.assert_close(model(choices), truth)


def test_autocast(tokens):
    model = add(build(ModelConfig(**SIZES)), **ADAPTERS)
    for gradients in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            truth = torch.cat(alone(model, NAMES, lambda i: model(tokens[i : i + 1])))
            with rows(model, NAMES):
                ours = model(tokens)
        assert ours.dtype == truth.dtype == torch.bfloat16
        assert (ours - truth).norm() < 0.02 * truth.norm()  # bfloat16 has 8 significant bits, sums in another order


def test_float32_adapters_on_a_bfloat16_base(tokens):
    model = add(build(ModelConfig(**SIZES)).bfloat16(), **ADAPTERS)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            truth = torch.cat(alone(model, NAMES, lambda i: model(tokens[i : i + 1])))
            with rows(model, NAMES):
                ours = model(tokens)
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() < 0.02 * truth.norm()


COMPILED = """
import torch
from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, activate, tune, tunings_of
from minillm.peft.mixed_batch import rows

sizes = dict(vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, max_positions=32, init_std=0.3)
model, tokens = build(ModelConfig(**sizes)), torch.randint(0, 41, (3, 7))
for name, rank in (("a", 3), ("b", 1)):
    tune(model, LoraConfig(rank=rank, targets=("q_proj", "up_proj")), name)
    for parameter in tunings_of(model)[name].parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    activate(model)
with rows(model, ["b", None, "a"]):
    own = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = model(tokens), compiled(tokens)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), own) for y in outputs], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for changed in (1.0, 2.0):  # what is kept of an adapter must follow it in compiled code, too
            own[0].mul_(changed)
            torch.testing.assert_close(compiled(tokens), model(tokens))
"""


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    """In a process of its own: the run-time shape checks of these tests cannot be traced."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dropout_has_the_probability_of_each_rows_adapter():
    """Base 0 and A = B = 1 x 1: an output is its input, dropped (0) or divided by 1 - p."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    add(model, half=LoraConfig(rank=1, alpha=1.0, targets=("0",), dropout=0.5), none=LoraConfig(1, 1.0, ("0",)))
    for name in ("half", "none"):
        for parameter in tunings_of(model)[name].parameters().values():
            nn.init.ones_(parameter)
    x = torch.ones(3, 1000, 1)
    with rows(model.train(), ["half", "none", None]):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                y = model(x)
            assert set(y[0].unique().tolist()) == {0.0, 2.0} and 0.45 < (y[0] == 0).float().mean() < 0.55
            assert (y[1] == 1).all() and (y[2] == 0).all()
        assert (model.eval()(x)[0] == 1).all()


def test_equals_peft_with_adapter_names(llama, tokens):
    """peft's own mixed batch, on a Llama of the Hub's library with the same adapters."""
    torch.manual_seed(0)
    theirs = peft.PeftModel(copy.deepcopy(llama), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True))
    add(
        llama,
        a=LoraConfig(rank=3, alpha=7.0, targets=("q_proj",)),
        b=LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "up_proj"), rslora=True),
    )
    layers = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name in ("a", "b"):
            for path, wrapper in tunings_of(llama)[name].wrappers:
                layers[path].lora_A[name].weight.copy_(wrapper.lora_A)
                layers[path].lora_B[name].weight.copy_(wrapper.lora_B)
        truth = theirs.eval()(tokens, adapter_names=["b", "__base__", "a", "b", "a"]).logits
        with rows(llama.eval(), ["b", None, "a", "b", "a"]):
            torch.testing.assert_close(llama(tokens).logits, truth, rtol=1e-5, atol=1e-5)
            options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens))
            ours = llama.generate(tokens, **options)
        assert torch.equal(ours, theirs.generate(tokens, adapter_names=["b", "__base__", "a", "b", "a"], **options))


def test_transposed_layers_of_the_hubs_gpt2(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_positions=16, n_embd=12, n_layer=2, n_head=2)).eval().double()
    add(model, a=LoraConfig(rank=2, alpha=3.0, targets=("c_attn",)), b=LoraConfig(rank=4, targets=("mlp.c_proj",)))
    names = ["b", "a", None, "a", "b"]
    truth = torch.cat(alone(model, names, lambda i: model(tokens[i : i + 1]).logits))
    with rows(model, names):
        torch.testing.assert_close(model(tokens).logits, truth)


def test_the_stacks_are_built_once_and_again_when_an_adapter_has_changed(model, tokens):
    with rows(model, NAMES):
        bank = next(module for module in model.modules() if isinstance(module, LoRABank))
        built = []
        original, bank._stacks = bank._stacks, lambda: built.append(1) or original()
        generate_tokens(model, tokens, max_new_tokens=6)
        assert built == [1]
        with torch.no_grad():
            before = model(tokens)
            next(iter(tunings_of(model)["a"].parameters().values())).mul_(2.0)
            after = model(tokens)
        assert len(built) == 2
        changed = (before != after).flatten(1).any(1).tolist()
        assert changed == [name == "a" for name in NAMES]


def test_adapters_made_in_inference_mode(tokens):
    """Their tensors count no versions, so nothing may be kept of them: what changes must show."""
    with torch.inference_mode():
        model = add(build(ModelConfig(**SIZES)), a=ADAPTERS["a"])
        with rows(model, ["a"] * 5):
            before = model(tokens)
            next(iter(tunings_of(model)["a"].parameters().values())).mul_(2.0)
            assert not torch.equal(model(tokens), before)


def test_another_device_or_dtype_inside_the_block(model, tokens):
    with rows(model, NAMES), torch.no_grad():
        exact = model(tokens)
        moved = model.float()(tokens)
        kept = [t for module in model.modules() if isinstance(module, LoRABank) for t in module._copied[2]]
    assert {t.dtype for t in (moved, *kept)} == {torch.float32}
    torch.testing.assert_close(moved.double(), exact, rtol=1e-3, atol=1e-3)


def test_save_inside_the_block_writes_the_adapter_alone(model, tmp_path):
    save_adapter(model, tmp_path / "outside", "a")
    with rows(model, NAMES):
        save_adapter(model, tmp_path / "inside", "a")
    for name in ("adapter_model.safetensors", "minillm.json", "adapter_config.json"):
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()


@pytest.mark.parametrize("active", [(), ("a",), ("a", "up")])
def test_afterwards_the_model_is_what_it_was(model, tokens, active):
    activate(model, *active, train=active[:1])
    model.eval()
    model.layers[0].train()
    model.norm.weight.requires_grad_(True)  # by hand, which nobody but its owner may undo
    before, output = state(model), model(tokens)
    with rows(model, NAMES):
        assert not torch.equal(model(tokens), output)
    assert_same(before, state(model))
    assert torch.equal(model(tokens), output)
    with pytest.raises(KeyError, match="within"), rows(model, NAMES):
        raise KeyError("within")
    assert_same(before, state(model))


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=2, trainable=("norm",)), Ia3Config(), PromptConfig(length=2)], ids=lambda c: c.name
)
def test_other_adapters_rest_inside_the_block(model, tokens, config):
    """Those in layers, those that train weights of the base, and those that stand before the model."""
    truth = torch.cat(alone(model, NAMES, lambda i: model(tokens[i : i + 1])))
    tune(model, config, "other")
    with torch.no_grad():
        for parameter in tunings_of(model)["other"].parameters().values():
            parameter.add_(1.0)
    before, output = state(model), model(tokens)
    with rows(model, NAMES):
        torch.testing.assert_close(model(tokens), truth)
    assert_same(before, state(model))
    assert torch.equal(model(tokens), output)


def test_on_a_base_in_four_bits(tokens):
    """QLoRA's base stays as it is; its adapters mix with plain ones that came later."""
    model = build(ModelConfig(**SIZES | dict(hidden_size=64)))
    add(model, q=QLoraConfig(rank=2, alpha=3.0, targets=("q_proj",)), a=ADAPTERS["a"])
    names = ["q", None, "a", "a", "q"]
    truth = torch.cat(alone(model, names, lambda i: model(tokens[i : i + 1])))
    with rows(model, names):
        torch.testing.assert_close(model(tokens), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 6, 10, 0])
def test_batch_of_another_size(model, size):
    before = state(model)
    message = rf"names the adapters of 5 rows, .* has {size}: give a batch of 5 rows;"
    with pytest.raises(ValueError, match=message), rows(model, NAMES):
        model(torch.zeros(size, 7, dtype=torch.long))
    assert_same(before, state(model))


@pytest.mark.parametrize(
    "names, repeats, message",
    [
        (["a", "poem", "ub"], 1, "no adapter 'poem'; did you mean(.|\n)*no adapter 'ub'; did you mean b"),
        ("a", 1, r"names: the name of an adapter or None for each row, such as .* not 'a'"),
        ([0, "a"], 1, r"names: the name of an adapter or None for each row"),
        (None, 1, r"names: the name of an adapter or None for each row"),
        ([], 0, "there is no row; name an adapter(.|\n)*repeats: a whole number, at least 1, not 0"),
        (["a"], 1.5, "repeats: a whole number, at least 1, not 1.5"),
    ],
)
def test_names_that_cannot_be(model, names, repeats, message):
    before = state(model)
    with pytest.raises(ValueError, match=message), rows(model, names, repeats=repeats):
        raise AssertionError("the block must not run")
    assert_same(before, state(model))


def test_adapters_that_are_not_lora_alone(model):
    tune(model, LoraConfig(rank=2, trainable=("norm",)), "head")
    activate(model)
    tune(model, Ia3Config(), "ia3")
    activate(model)
    before = state(model)
    message = (
        r"(?s)cannot mix adapters in this Decoder, which is unchanged:\n"
        r"  'head' has trained more than LoRA, weights of the base itself: norm\.weight\n  'ia3' is not LoRA but "
    )
    with pytest.raises(ValueError, match=message), rows(model, ["a", "head", "head", "ia3"]):
        raise AssertionError
    assert_same(before, state(model))


def test_an_adapted_embedding():
    model = add(build(ModelConfig(tie_embeddings=False, **SIZES)), e=LoraConfig(rank=2, targets=("embed_tokens",)))
    with pytest.raises(ValueError, match="'e' adapts more than linear layers: embed_tokens"), rows(model, ["e"]):
        raise AssertionError


def test_nested_untuned_and_merged(model, tokens):
    with rows(model, NAMES):
        inside = model(tokens)
        with pytest.raises(ValueError, match=r"inside another rows\(\) already"), rows(model, ["a"]):
            raise AssertionError
        assert torch.equal(model(tokens), inside)
    with pytest.raises(ValueError, match="nothing to mix: this Decoder is not tuned"), rows(build(model.config), ["a"]):
        raise AssertionError
    single = add(build(ModelConfig(**SIZES)), a=ADAPTERS["a"])
    activate(single, "a")
    merge(single, keep=True)
    with pytest.raises(ValueError, match=r"merged for a time; unmerge\(model\) first"), rows(single, ["a"]):
        raise AssertionError
    unmerge(single)
    with rows(single, ["a"]):
        pass


def test_switching_inside_the_block_is_told_and_undone(model, tokens):
    before = state(model)
    for change in (lambda: activate(model, "a"), lambda: tune(model, LoraConfig(rank=1), "new")):
        with pytest.raises(ValueError, match="added, switched or dropped inside rows"), rows(model, NAMES):
            change()
        assert not any(isinstance(module, LoRABank) for module in model.modules())
    assert "new" in tunings_of(model) and not tunings_of(model)["new"].active
    assert before[0] == state(model)[0]


def test_code_that_reads_the_weight_of_a_mixed_layer():
    """nn.MultiheadAttention never calls out_proj, and there is no one weight for all rows."""
    attention = add(nn.MultiheadAttention(8, 2, batch_first=True), a=LoraConfig(rank=2, targets=("out_proj",)))
    x, message = torch.randn(2, 3, 8), "another weight for each row of the batch: call the layer"
    with pytest.raises(ValueError, match=message), rows(attention, ["a", None]):
        attention(x, x, x)
