"""Weighted sums of adapters: against W + sum_i w_i scale_i B_i A_i made by hand, and against peft's "cat"."""

import copy
import math

import peft
import pytest
import torch

from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, activate, load_adapter, merge, save_adapter, tune, tunings_of, unload, unmerge
from minillm.peft.combination import combine
from minillm.peft.mixed_batch import rows

ADAPTERS = {
    "a": LoraConfig(rank=3, alpha=7.0, targets=("q_proj", "v_proj")),
    "b": LoraConfig(rank=4, alpha=2.0, targets=("q_proj", "up_proj"), rslora=True),
    "c": LoraConfig(
        rank=1, alpha=5.0, targets=("all-linear",), rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 3}
    ),
}
TWINS = {"a": LoraConfig(rank=3, alpha=7.0), "b": LoraConfig(rank=3, alpha=2.0, rslora=True)}
SIZES = dict(vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=32, init_std=0.3)


def add(model, **configs):
    """Put adapters on the model, each alone on the base, and leave all of them inactive."""
    generator = torch.Generator().manual_seed(3)
    for name, config in configs.items():
        if tunings_of(model):
            activate(model)
        tune(model, config, name)
        with torch.no_grad():
            for parameter in tunings_of(model)[name].parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    activate(model)
    return model


@pytest.fixture
def model():
    return add(build(ModelConfig(**SIZES)), **ADAPTERS)


@pytest.fixture
def twins():
    return add(build(ModelConfig(**SIZES)), **TWINS)


@pytest.fixture
def tokens():
    return torch.randint(0, 41, (3, 7))


def updates(model, name):
    """Layer -> scale * B A in float64, with the scale from the config by hand."""
    tuning = tunings_of(model)[name]
    config, found = tuning.config, {}
    for layer, wrapper in tuning.wrappers:
        a, b = wrapper.lora_A.detach().double(), wrapper.lora_B.detach().double()
        alpha = next((v for k, v in config.alpha_pattern if f".{layer}".endswith(f".{k}")), config.alpha)
        found[layer] = alpha / (math.sqrt(len(a)) if config.rslora else len(a)) * (b @ a)
    return found


def weighted_sum(model, weights):
    total = {}
    for name, weight in weights.items():
        for layer, update in updates(model, name).items():
            total[layer] = total.get(layer, 0) + weight * update
    return total


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 1.0, "b": -1.0, "c": 2.5}, {"c": -0.3}])
def test_complaint_10_concat_is_the_exact_sum(model, weights):
    """Different ranks, alphas, rsLoRA and targets; negative weights. peft #643: other ways were silently wrong."""
    exact = weighted_sum(model, weights)
    report = combine(model, weights, "mix")
    made = updates(model, "mix")
    assert made.keys() == exact.keys() == report.errors.keys()
    for layer, update in exact.items():
        torch.testing.assert_close(made[layer], update, rtol=1e-5, atol=1e-6)
    assert max(report.errors.values()) < 1e-6 and report.error < 1e-6  # float32 rounding


def test_concat_is_the_default_and_ranks_add_up(model):
    report = combine(model, {"a": 0.5, "b": 0.5, "c": 1.0}, "mix")
    assert report.how == "concat"
    at = "layers.0.self_attn."
    assert report.ranks[f"{at}q_proj"] == 3 + 4 + 1
    assert report.ranks[f"{at}k_proj"] == 2
    assert report.ranks["layers.1.mlp.up_proj"] == 4 + 1
    assert report.ranks["layers.1.mlp.down_proj"] == 1


def test_outputs_are_those_of_the_base_plus_the_sum(model, tokens):
    exact = weighted_sum(model, {"a": 0.5, "c": -1.5})
    summed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, update in exact.items():
            summed.get_submodule(layer).weight.add_(update)
    combine(model, {"a": 0.5, "c": -1.5}, "mix")
    activate(model, "mix")
    torch.testing.assert_close(model(tokens), summed(tokens), rtol=1e-4, atol=1e-5)


def test_complaint_10_rslora_is_not_over_scaled_by_sqrt_r(twins):
    """peft PR #3449: a new adapter that copies use_rslora from the first has alpha / sqrt(r) = sqrt(r) for a scale."""
    exact = updates(twins, "b")
    for how in ("concat", "linear", "svd"):
        combine(twins, {"b": 1.0}, how, how=how)
        assert not tunings_of(twins)[how].config.rslora
        assert {wrapper.scale for _, wrapper in tunings_of(twins)[how].wrappers} == {1.0}
        for layer, update in updates(twins, how).items():
            torch.testing.assert_close(update, exact[layer], rtol=1e-5, atol=1e-6)


def test_complaint_10_saved_and_reloaded_with_its_rank_pattern(model, tokens, tmp_path):
    """peft #3737: the ranks differ from layer to layer, and the file must say so."""
    combine(model, {"a": 1.0, "b": -2.0, "c": 0.5}, "mix")
    activate(model, "mix")
    before = model(tokens)
    save_adapter(model, tmp_path / "mix", "mix")
    fresh = build(model.config)
    activate(model)
    fresh.load_state_dict(model.state_dict())
    load_adapter(fresh, tmp_path / "mix")
    assert torch.equal(fresh(tokens), before)


def test_peft_reads_the_saved_combination(llama, tokens, tmp_path):
    twin = copy.deepcopy(llama)
    add(llama, **ADAPTERS)
    combine(llama, {"a": 1.0, "b": -2.0, "c": 0.5}, "mix")
    activate(llama, "mix")
    save_adapter(llama, tmp_path / "mix", "mix")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "mix").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits, rtol=1e-4, atol=1e-5)


def peft_pair(llama):
    """Our model and peft's with the same two adapters, of equal rank and neither with rsLoRA."""
    targets = ["q_proj", "v_proj"]
    theirs = peft.PeftModel(copy.deepcopy(llama), peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=2, target_modules=targets))
    add(llama, a=LoraConfig(rank=3, alpha=7.0), b=LoraConfig(rank=3, alpha=2.0))
    layers = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name in ("a", "b"):
            for path, wrapper in tunings_of(llama)[name].wrappers:
                layers[path].lora_A[name].weight.copy_(wrapper.lora_A)
                layers[path].lora_B[name].weight.copy_(wrapper.lora_B)
    return theirs, layers


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -1.0)])
@pytest.mark.parametrize("how, combination_type", [("concat", "cat"), ("linear", "linear"), ("svd", "svd")])
def test_equals_peft(llama, how, combination_type, weights):
    theirs, layers = peft_pair(llama)
    theirs.add_weighted_adapter(["a", "b"], list(weights), "mix", combination_type=combination_type)
    combine(llama, dict(zip("ab", weights, strict=True)), "mix", how=how)
    ours = updates(llama, "mix")
    assert len(ours) == 4
    for layer, update in ours.items():
        delta = layers[layer].get_delta_weight("mix").detach().double()
        torch.testing.assert_close(update, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 2.0, "b": -1.0}])
def test_linear_has_cross_terms_and_says_how_much(twins, weights):
    """With u_i the root of |w_i| scale_i and the signs on A: u_a u_b (sign_b B_a A_b + sign_a B_b A_a). peft #3004."""
    exact, made = weighted_sum(twins, weights), combine(twins, weights, "mix", how="linear")
    scales = {"a": 7.0 / 3, "b": 2.0 / math.sqrt(3)}
    roots = math.prod(math.sqrt(abs(weights[n]) * scales[n]) for n in "ab")
    wrong, whole = [], []
    for layer, update in updates(twins, "mix").items():
        a, b = (dict(tunings_of(twins)[n].wrappers)[layer] for n in "ab")
        cross = (
            math.copysign(1, weights["b"]) * a.lora_B @ b.lora_A + math.copysign(1, weights["a"]) * b.lora_B @ a.lora_A
        )
        torch.testing.assert_close(update - exact[layer], (roots * cross).detach().double(), rtol=1e-4, atol=1e-5)
        wrong.append((update - exact[layer]).norm().item())
        whole.append(exact[layer].norm().item())
        assert made.errors[layer] == pytest.approx(wrong[-1] / whole[-1], rel=1e-5)
    assert made.error == pytest.approx(math.hypot(*wrong) / math.hypot(*whole), rel=1e-5)
    assert made.error > 0.3
    assert f"'mix' (linear): relative error {made.error:.2g} over 4 layers" in str(made)


def test_linear_is_exact_where_there_is_nothing_to_cross():
    """Adapters in different layers, of different ranks."""
    model = add(
        build(ModelConfig(**SIZES)), q=LoraConfig(rank=3, targets=("q_proj",)), v=LoraConfig(2, 4.0, ("v_proj",))
    )
    report = combine(model, {"q": 0.5, "v": -1.5}, "mix", how="linear")
    assert report.error < 1e-6 and set(report.ranks.values()) == {3, 2}


@pytest.mark.parametrize("rank", [1, 2, 5, None, 100])
def test_complaint_10_svd_is_the_best_approximation_and_reports_its_error(model, rank):
    """By Eckart and Young the error is what the singular values after the first R hold, from torch's own SVD."""
    weights = {"a": 1.0, "b": -2.0, "c": 0.5}
    exact = weighted_sum(model, weights)
    report = combine(model, weights, "mix", how="svd", rank=rank)
    made = updates(model, "mix")
    for layer, update in exact.items():
        singular = torch.linalg.svdvals(update)
        kept = report.ranks[layer]
        sizes = {"a": 3, "b": 4, "c": 2 if "k_proj" in layer else 1}
        there = [size for name, size in sizes.items() if layer in updates(model, name)]
        assert kept == min(max(there) if rank is None else rank, sum(there), *update.shape)
        best = (singular[kept:].norm() / singular.norm()).item()
        assert report.errors[layer] == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert ((made[layer] - update).norm() / update.norm()).item() == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert report.error < 1e-6 if rank == 100 else report.error > 1e-3


def test_ranks_beyond_what_a_layer_can_have_are_still_exact():
    """8 + 8 + 8 > 16: the sum has rank 16 at most, and is written so."""
    model = add(build(ModelConfig(**SIZES)), **{n: LoraConfig(rank=8, alpha=3.0, targets=("q_proj",)) for n in "abc"})
    weights = {"a": 1.0, "b": -1.0, "c": 0.7}
    exact = weighted_sum(model, weights)
    report = combine(model, weights, "mix")
    assert set(report.ranks.values()) == {16} and report.error < 1e-6
    for layer, update in updates(model, "mix").items():
        torch.testing.assert_close(update, exact[layer], rtol=1e-4, atol=1e-5)


def test_adapters_that_cancel(twins):
    """a - a = 0: nothing to be relative to, and nothing wrong."""
    combine(twins, {"a": 1.0}, "same")
    report = combine(twins, {"a": 1.0, "same": -1.0}, "zero")
    assert all(update.abs().max() < 1e-6 for update in updates(twins, "zero").values())
    assert str(report)


def test_a_bfloat16_base_has_float32_factors():
    model = add(build(ModelConfig(**SIZES)).bfloat16(), **ADAPTERS)
    report = combine(model, {"a": 0.5, "c": 1.0}, "mix")
    assert {p.dtype for p in tunings_of(model)["mix"].parameters().values()} == {torch.float32}
    assert report.error < 1e-6


def test_embeddings(tokens):
    config = LoraConfig(rank=2, alpha=3.0, targets=("embed_tokens", "q_proj"))
    model = add(build(ModelConfig(tie_embeddings=False, **SIZES)), a=config, b=config)
    outputs = {}
    for name in ("a", "b"):
        wrapper = dict(tunings_of(model)[name].wrappers)["embed_tokens"]
        outputs[name] = wrapper.scale * (wrapper.lora_embedding_B @ wrapper.lora_embedding_A).t()
    report = combine(model, {"a": 0.5, "b": -1.0}, "mix")
    base = model.embed_tokens.weight.clone()
    activate(model, "mix")
    torch.testing.assert_close(model.embed_tokens.weight - base, 0.5 * outputs["a"] - outputs["b"])
    assert report.error < 1e-6


@pytest.mark.parametrize("active", [(), ("a",), ("b", "c")])
def test_what_was_active_stays_so_and_trains_on(model, tokens, active):
    activate(model, *active, train=active[:1])
    before, trains = model(tokens), {n for n, p in model.named_parameters() if p.requires_grad}
    combine(model, {"a": 0.5, "b": 0.5}, "mix")
    assert torch.equal(model(tokens), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    assert [n for n, t in tunings_of(model).items() if t.active] == list(active)
    for name in ADAPTERS:  # the new one stands on the base, so nothing that it was made of must stay
        unload(model, name)
    assert list(tunings_of(model)) == ["mix"]


def test_a_combination_is_an_adapter_like_others(model, tokens):
    """Combined again, mixed by rows, merged."""
    combine(model, {"a": 0.5, "b": 0.5}, "half")
    report = combine(model, {"half": 2.0, "b": -1.0}, "a_again")
    assert report.error < 1e-6
    activate(model, "a")
    truth = model(tokens)
    with rows(model, ["a_again", "a", "a_again"]):
        torch.testing.assert_close(model(tokens), truth, rtol=1e-4, atol=1e-5)


def test_arguments_that_cannot_be(model, tokens):
    tune(model, LoraConfig(rank=2, trainable=("norm",)), "head")
    activate(model)
    names = list(tunings_of(model))
    cases = [
        ({"a": 1.0, "zz": 1.0}, "mix", {}, "no adapter 'zz'; did you mean"),
        ({}, "mix", {}, 'weights: a number for each adapter, such as {"a": 0.5, "b": -1.0}, not {}'),
        (["a"], "mix", {}, "weights: a number for each adapter"),
        ({"a": 0}, "mix", {}, "'a': a finite number, not 0, instead of 0"),
        ({"a": math.nan, "b": True}, "mix", {}, "(?s)'a': a finite.*nan.*'b': a finite number, not 0, instead of True"),
        ({"a": 1.0}, "b", {}, "it has an adapter 'b'"),
        ({"a": 1.0}, "", {}, "'' cannot name an adapter"),
        ({"a": 1.0}, "mix", {"how": "cat"}, "how='cat': one of concat, linear, svd"),
        ({"a": 1.0}, "mix", {"rank": 2}, "rank=2 is for how=\"svd\"; with 'concat' the ranks follow"),
        ({"a": 1.0}, "mix", {"how": "svd", "rank": 0}, "rank=0: a whole number, at least 1"),
        ({"a": 1.0, "b": 1.0}, "mix", {"how": "linear"}, "in layers.0.self_attn.q_proj the ranks are {'a': 3, 'b': 4}"),
        ({"head": 1.0}, "mix", {}, "'head' has trained more than LoRA, weights of the base itself: norm.weight"),
    ]
    for weights, name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            combine(model, weights, name, **options)
        assert list(tunings_of(model)) == names and not any(t.active for t in tunings_of(model).values())


def test_untuned_merged_and_other_methods():
    from minillm.peft import FullConfig

    model = build(ModelConfig(**SIZES))
    with pytest.raises(ValueError, match="nothing to combine: this Decoder is not tuned"):
        combine(model, {"a": 1.0}, "mix")
    tune(model, LoraConfig(), "a")
    merge(model, keep=True)
    with pytest.raises(ValueError, match=r"merged for a time; unmerge\(model\) first"):
        combine(model, {"a": 1.0}, "mix")
    unmerge(model)
    other = build(ModelConfig(**SIZES))
    tune(other, FullConfig(), "all")
    with pytest.raises(ValueError, match="'all' is not LoRA but"):
        combine(other, {"all": 1.0}, "mix")
