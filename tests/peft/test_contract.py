"""What every method of tuning promises, on every kind of model. A method joins by one entry in contract_cases.py."""

import copy
import subprocess
import sys

import pytest
import torch
from contract_cases import CASES, KINDS, compute, loss_of, make_batch, make_model

from minillm.layers import KVCache
from minillm.peft import (
    METHODS,
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


@pytest.fixture(params=[(name, kind) for name in CASES for kind in KINDS], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def setting(request):
    """(case, config, base, batch); skips, with the reason, what the case says does not apply."""
    name, kind = request.param
    case, test = CASES[name], request.function.__name__.removeprefix("test_")
    unknown = [key for key in case.without if f"test_{key}" not in globals()]
    assert not unknown, f"{name} excuses itself from tests that do not exist: {unknown}"
    if test in case.without:
        pytest.skip(case.without[test])
    base = make_model(kind)
    case.prepare(base)
    return case, case.of(kind), base, make_batch(kind)


def trained(model):
    """What the newest adapter trains, by the names of its plan."""
    return list(tunings_of(model).values())[-1].parameters()


def start(setting):
    """The base, tuned."""
    _, config, model, _ = setting
    return model, tune(model, config, name="new")


def perturb(model, seed=7):
    """Move what trains off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def train(model, batch, steps, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        extra = auxiliary_loss(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    return losses


def bits(model):
    """Everything that can differ between two models: modules, weights, buffers, and what trains."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return modules, tensors, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_same_bits(model, before):
    modules, tensors, flags = bits(model)
    assert (modules, flags) == (before[0], before[2]) and tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


def test_every_method_has_a_case():
    assert {name.partition("+")[0] for name in CASES} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name and method.peft_type and method.title and method.formula
    assert method.paper or name in ("full", "partial")


def test_starts_as_identity(setting):
    _, config, model, batch = setting
    before = compute(model, batch)
    tune(model, config, name="new")
    assert torch.equal(compute(model, batch), before) == (not config.start)


def test_count_is_the_formula(setting, request):
    case, config, model, _ = setting
    expected = case.count[request.node.callspec.params["setting"][1]]
    assert num_parameters(config, model) == expected
    report = tune(model, config, name="new")
    assert sum(p.numel() for p in trained(model).values()) == report.trainable == expected
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained(model).values()}
    assert f"{config.name}: {expected:,} of {report.total:,} values train" in str(report)


def test_gradient_reaches_what_trains_and_nothing_else(setting):
    case, _, _, batch = setting
    model, _ = start(setting)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, batch, steps=2, lr=0.01)  # first: where an adapter starts as the identity half of it has no gradient
    model.zero_grad()
    loss = loss_of(model, batch) + sum(filter(lambda x: x is not None, [auxiliary_loss(model)]))
    loss.backward()
    for name, parameter in trained(model).items():
        dead = [end for end in case.dead if name.endswith(end)]
        alive = parameter.grad is not None and parameter.grad.norm() > 1e-7
        assert alive != bool(dead), (name, parameter.grad)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name


def test_five_steps_lower_the_loss(setting):
    case, _, _, batch = setting
    model, _ = start(setting)
    losses = train(model, batch, steps=6, lr=case.lr)
    assert losses[-1] < 0.99 * losses[0]


def test_save_then_load_into_a_fresh_base(setting, tmp_path):
    case, _, base, batch = setting
    fresh = copy.deepcopy(base)
    model, report = start(setting)
    train(model, batch, steps=2, lr=case.lr)
    save_adapter(model, tmp_path / "adapter", "new")
    assert load_adapter(fresh, tmp_path / "adapter", "new") == report
    ours, theirs = trained(model), trained(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    model.eval(), fresh.eval()
    assert torch.equal(compute(fresh, batch), compute(model, batch))
    assert_same_bits(fresh, bits(model))


def test_saved_file_weighs_what_its_parameters_weigh(setting, tmp_path):
    model, report = start(setting)
    save_adapter(model, tmp_path / "adapter", "new")
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == 4 * report.trainable


def test_another_base_is_refused(setting, tmp_path):
    base = setting[2]
    fresh = copy.deepcopy(base)
    model, _ = start(setting)
    save_adapter(model, tmp_path / "adapter", "new")
    frozen = [p for n, p in fresh.named_parameters() if n not in tunings_of(model)["new"].plan.parameters]
    with torch.no_grad():
        frozen[0].view(-1)[0] += 1e-3
    before = bits(fresh)
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        load_adapter(fresh, tmp_path / "adapter", "new")
    assert_same_bits(fresh, before)


def test_unload_restores_the_base(setting):
    _, config, model, _ = setting
    next(iter(model.parameters())).requires_grad_(False)  # the base's own flags come back too
    before = bits(model)
    perturb(start(setting)[0])
    if not config.keeps_base:
        with pytest.raises(ValueError, match="trained the base's own weights; load the base again"):
            unload(model, "new")
        return
    unload(model, "new")
    assert_same_bits(model, before)
    tune(model, config, name="new")  # and it can be tuned again


def test_switching_off_and_on(setting):
    _, config, model, batch = setting
    under, before, plain = tuple(tunings_of(model)), bits(model), compute(model.eval(), batch)
    perturb(start(setting)[0]).eval()
    tuned = compute(model, batch)
    if config.keeps_base:
        activate(model, *under)
        assert torch.equal(compute(model, batch), plain)
        assert bits(model)[0] == before[0]
        activate(model, *under, "new")
    assert torch.equal(compute(model, batch), tuned) and not torch.equal(tuned, plain)


def test_merge_or_why_not(setting):
    _, config, model, batch = setting
    keys, modules = list(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    perturb(start(setting)[0]).eval()
    tuned, before = compute(model, batch), bits(model)
    if config.cannot_merge:
        with pytest.raises(CannotMerge, match=config.name):
            merge(model)
        assert_same_bits(model, before)
        return
    merge(model)
    assert set(list(model.state_dict())) >= set(keys)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters()) and not tunings_of(model)  # an ordinary model again
    # float32: rounding W + s B A moves a weight by 2^-24 of itself; three layers and a head of logits ~10 leave 1e-4
    torch.testing.assert_close(compute(model, batch), tuned, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(setting):
    batch = setting[3]
    model = perturb(start(setting)[0])
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        loss_of(model, batch).backward()
        gradients.append({name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_autocast_gives_float32_gradients_near_the_exact_ones(setting):
    batch = setting[3]
    model = perturb(start(setting)[0])
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(model, batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None]))
    exact, cast = gradients
    assert cast.dtype == torch.float32
    assert (cast - exact).norm() < 0.05 * exact.norm()  # bfloat16 products keep 8 bits, some layers deep


def test_cached_equals_uncached(setting):
    model, batch = setting[2:]
    perturb(start(setting)[0]).eval()
    if not hasattr(model, "lm_head"):
        pytest.skip("an encoder has no cache")
    expected, tokens = compute(model, batch), batch["tokens"]
    decoder = model.condition(batch["source"]) if "source" in batch else model
    cache = [KVCache() for _ in decoder.layers]
    steps = [decoder(tokens[:, :5], cache=cache)] + [decoder(tokens[:, t : t + 1], cache=cache) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(setting, side):
    model, batch = perturb(start(setting)[0]).eval(), setting[3]
    expected = compute(model, batch)
    field = "source" if "source" in batch else "tokens"

    def pad(real, value):
        padding = torch.full_like(real[:, :2], value)
        return torch.cat([padding, real] if side == "left" else [real, padding], 1)

    mask = pad(torch.ones_like(batch[field], dtype=torch.bool), False)
    padded = batch | {field: pad(batch[field], 0), ("source_mask" if field == "source" else "mask"): mask}
    logits = compute(model, padded)
    if field == "tokens" and logits.dim() == 3:
        logits = logits[:, 2:] if side == "left" else logits[:, :-2]
    if side == "left" and logits.dim() == 2:
        pytest.skip("a classifier that pools the first token reads texts padded on the right")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_row_gets_what_it_gets_among_others(setting):
    model, batch = perturb(start(setting)[0]).eval(), setting[3]
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    torch.testing.assert_close(compute(model, alone), compute(model, batch)[1:], rtol=1e-4, atol=1e-4)


def test_a_copy_is_a_model_of_its_own(setting):
    case, _, _, batch = setting
    model = perturb(start(setting)[0])
    twin = copy.deepcopy(model)
    before = compute(model, batch)
    assert torch.equal(compute(twin, batch), before)
    train(twin, batch, steps=1, lr=case.lr)
    assert torch.equal(compute(model, batch), before) and not torch.equal(compute(twin, batch), before)
    activate(twin, *tunings_of(twin))
    assert {id(p) for p in trained(twin).values()}.isdisjoint(id(p) for p in model.parameters())


def test_stacking(setting):
    """A LoRA on top starts as the identity, trains beside the method, and leaves it bit for bit when it goes."""
    batch = setting[3]
    model = perturb(start(setting)[0]).eval()
    before, tuned = bits(model), compute(model, batch)
    tune(model, LoraConfig(rank=2, alpha=6.0, targets=("v_proj",)), name="top")
    torch.testing.assert_close(compute(model, batch), tuned, rtol=1e-5, atol=1e-5)
    perturb(model)
    assert not torch.allclose(compute(model, batch), tuned, atol=1e-3)
    activate(model, *tunings_of(model))
    model.zero_grad()
    train(model, batch, steps=1, lr=0.01)
    model.zero_grad()
    loss_of(model, batch).backward()
    with_gradient = {n for t in tunings_of(model).values() for n, p in t.parameters().items() if p.grad is not None}
    assert {n for n in trained(model)} <= with_gradient and with_gradient > set(trained(model))
    unload(model, "top")
    assert bits(model)[0] == before[0]


def test_tuning_twice_is_refused(setting):
    _, config, model, _ = setting
    start(setting)
    before = bits(model)
    with pytest.raises(ValueError, match=r"tuned already; merge.model. or unload.model. it first"):
        tune(model, config, name="new")
    assert_same_bits(model, before)


COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from contract_cases import CASES, KINDS, compute, make_batch, make_model
from minillm.peft import tune, tunings_of

for number, (name, case) in enumerate(CASES.items()):
    if "compiled_without_a_graph_break" in case.without:
        continue
    for place, kind in enumerate(KINDS):
        torch._dynamo.reset()
        backend = "aot_eager" if place == number % len(KINDS) else "eager"
        model, batch = make_model(kind), make_batch(kind)
        case.prepare(model)
        tune(model, case.of(kind), name="new")
        parameters = list(tunings_of(model)["new"].parameters().values())
        with torch.no_grad():
            for p in parameters:
                p += 0.1 * torch.randn(p.shape)
        outputs, gradients = [], []
        for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
            try:
                outputs.append(compute(run, batch))
                gradients.append(torch.autograd.grad(outputs[-1].square().mean(), parameters, allow_unused=True))
            except Exception as error:
                sys.exit(f"{name} on {kind}: {error}")
        torch.testing.assert_close(outputs[1], outputs[0], msg=lambda m: f"{name} on {kind}: {m}")
        eager, traced = ([g for g in run if g is not None] for run in gradients)
        torch.testing.assert_close(traced, eager)
"""


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    """Traced forward and backward equal the eager ones. No code is generated, so no C++ compiler is needed.

    On every kind of model one graph holds the forward; on one kind in turn the backward is traced as well, which takes
    longer than all the rest.
    In a process of its own: the run-time shape checks of these tests cannot be traced.
    """
    here = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", COMPILED, here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
