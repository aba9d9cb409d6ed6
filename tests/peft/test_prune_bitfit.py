"""Pruned BitFit: what the scores estimate, what is kept, and that the rest stays as it was pretrained."""

import copy

import pytest
import torch
from torch import nn

from minillm.config import from_dict, to_dict
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.peft import FullConfig, LoraConfig, load_adapter, merge, save_adapter, tune, unload, unmerge
from minillm.peft.bitfit import BitFitConfig
from minillm.peft.method import CannotMerge
from minillm.peft.prune_bitfit import BiasScores
from minillm.peft.sparse_bias import PrunedBitFitConfig, SparseBias

SIZES = dict(vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_positions=32)
BIASED = dict(norm="layer", mlp="plain", activation="gelu", positions="learned", attention_bias=True, mlp_bias=True)
UP = "layers.0.mlp.up_proj.bias"
KEPT = ((UP, (0, 3, 23)), ("layers.1.attn_norm.bias", (15,)), ("norm.bias", (2, 4)))


@pytest.fixture
def biased():
    """A decoder whose pretrained biases are not zero, in float64."""
    torch.manual_seed(0)
    model = build(ModelConfig(**SIZES, **BIASED, init_std=0.3)).double()
    return with_biases(model)


def with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def train(model, tokens, loss_fn, steps=3, scores=None, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, tokens).value.backward()
        if scores is not None:
            scores.update()
        optimizer.step()


def scored(model, tokens, loss_fn, config=None):
    tune(model, config or BitFitConfig())
    scores = BiasScores(model)
    train(model, tokens, loss_fn, scores=scores)
    return scores


# what the scores are


@pytest.mark.parametrize("name", ["norm.bias", UP, "layers.1.self_attn.v_proj.bias"])
def test_score_of_a_vector_is_the_change_of_the_loss_without_its_update(biased, tokens, loss_fn, name):
    """Toy mistakes: the value b instead of the update d; the gradient alone; the loss is the outside truth."""
    without = loss_fn(biased, tokens).value.item()
    tune(biased, BitFitConfig((name,)))
    scores = BiasScores(biased)
    bias = biased.get_parameter(name)
    with torch.no_grad():
        bias += 1e-5 * torch.randn_like(bias)
    loss = loss_fn(biased, tokens).value
    loss.backward()
    scores.update()
    assert scores.vectors[name] == pytest.approx(abs(without - loss.item()), rel=1e-2)


def test_score_of_an_entry_is_the_change_of_the_loss_without_its_update(biased, tokens, loss_fn):
    without = loss_fn(biased, tokens).value.item()
    tune(biased, BitFitConfig((UP,)))
    scores = BiasScores(biased)
    with torch.no_grad():
        biased.layers[0].mlp.up_proj.bias[5] += 1e-5
    loss = loss_fn(biased, tokens).value
    loss.backward()
    scores.update()
    entries = scores.entries[UP]
    assert entries[5].item() == pytest.approx(abs(without - loss.item()), rel=1e-2)
    assert not entries[:5].count_nonzero() and not entries[6:].count_nonzero()


def test_signs_count_until_all_is_summed():
    """By hand, updates d = (2, -1) and gradients (1, 3), then (1, -1).

    First step -d g = (-2, 3), second (-2, -1): entries |(-4, 2)|, the vector |-2|. Toy mistake: sizes first, (4, 4).
    """
    model = nn.Sequential(nn.Linear(3, 2))
    tune(model, BitFitConfig())
    scores = BiasScores(model)
    with torch.no_grad():
        model[0].bias += torch.tensor([2.0, -1.0])
    for gradient in ([1.0, 3.0], [1.0, -1.0]):
        model[0].bias.grad = torch.tensor(gradient)
        scores.update()
    torch.testing.assert_close(scores.entries["0.bias"], torch.tensor([4.0, 2.0]))
    assert scores.vectors["0.bias"] == pytest.approx(2.0)


def test_key_biases_are_the_first_to_go(biased, tokens, loss_fn):
    """Softmax forgets them (see test_bitfit.py), so their estimate is zero up to rounding."""
    scores = scored(biased, tokens, loss_fn).vectors
    keys = {name for name in scores if "k_proj" in name}
    assert set(sorted(scores, key=scores.get)[: len(keys)]) == keys


def test_scores_know_created_biases_and_leave_heads_out(decoder, tokens, loss_fn):
    config = BitFitConfig(create_missing=True, trainable=("lm_head",))
    scores = scored(decoder, tokens, loss_fn, config)
    assert "layers.0.mlp.up_proj.bias" in scores.vectors and not any("lm_head" in name for name in scores.vectors)
    kept = scores.keep_vectors(4)
    assert len(kept.biases) == 4 and kept.create_missing and kept.trainable == ("lm_head",)
    unload(decoder)
    assert len(tune(decoder, kept).modules) == 4 + 1


def test_the_bias_of_a_head_that_trains_in_full_is_not_scored():
    encoder = build(ModelConfig(**{**SIZES, **BIASED, "kind": "encoder"}))
    tune(model := nn.ModuleDict({"body": encoder, "head": nn.Linear(16, 3)}), BitFitConfig(trainable=("head",)))
    scores = BiasScores(model)
    assert "body.norm.bias" in scores.vectors and "head.bias" not in scores.vectors
    unload(model)
    tune(model, BitFitConfig(("head",), trainable=("head",)))
    with pytest.raises(ValueError, match="there is no bias to score: all that trains is in `trainable`"):
        BiasScores(model)


# structured: whole vectors


def test_best_vectors_are_kept_and_the_rest_is_pretrained_again(biased, tokens, loss_fn):
    """Toy mistakes: a pruned bias becomes 0; the kept ones go on from where they were."""
    before = copy.deepcopy(biased.state_dict())
    scores = scored(biased, tokens, loss_fn)
    best = sorted(scores.vectors, key=scores.vectors.get)[-5:]
    config = scores.keep_vectors(5)
    assert set(config.biases) == set(best) and scores.keep_vectors(5 / len(scores.vectors)) == config
    unload(biased)
    report = tune(biased, config)
    assert report.trainable == sum(before[name].numel() for name in best)
    assert all(torch.equal(tensor, before[name]) for name, tensor in biased.state_dict().items())
    train(biased, tokens, loss_fn)
    moved = {name for name, tensor in biased.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(best)


def test_kept_names_mean_these_biases_alone(tokens):
    """The head's norm.bias is the end of body.norm.bias: training both would not be what was scored."""
    torch.manual_seed(0)
    model = build_with_head(ModelConfig(**{**SIZES, **BIASED, "kind": "encoder"}), HeadConfig("masked_lm"))
    tune(model, BitFitConfig())
    scores = BiasScores(model)
    with torch.no_grad():
        model.norm.bias += 1.0
    model(tokens).square().mean().backward()
    scores.update()
    config = scores.keep_vectors(1)
    unload(model)
    assert set(config.plan(model).parameters) == {"norm.bias"}


# unstructured: single entries


def test_best_entries_of_all_biases_together(biased, tokens, loss_fn):
    scores = scored(biased, tokens, loss_fn)
    config = scores.keep_entries(20)
    everything = torch.cat(list(scores.entries.values()))
    threshold = everything.topk(20).values[-1]
    kept = dict(config.kept)
    assert sum(map(len, kept.values())) == 20 and len(kept) > 1
    for name, entries in scores.entries.items():
        assert kept.get(name, ()) == tuple((entries >= threshold).nonzero().flatten().tolist())
    assert scores.keep_entries(20 / len(everything)) == config
    unload(biased)
    assert tune(biased, config).trainable == 20


def test_pruned_entries_keep_their_pretrained_values_in_training(biased, tokens, loss_fn):
    """Toy mistake: only the gradient is masked, and weight decay or momentum moves what was pruned."""
    before = copy.deepcopy(biased.state_dict())
    outputs = biased(tokens)
    tune(biased, PrunedBitFitConfig(KEPT))
    assert torch.equal(biased(tokens), outputs)
    train(biased, tokens, loss_fn, steps=5)
    assert not torch.allclose(biased(tokens), outputs)
    merge(biased)
    for name, tensor in biased.state_dict().items():
        expected = torch.zeros_like(tensor, dtype=torch.bool)
        expected[list(dict(KEPT).get(name, ()))] = True
        assert torch.equal(tensor != before[name], expected), name


def test_gradients_are_those_of_the_same_entries_of_the_bias(biased, tokens, loss_fn):
    twin = copy.deepcopy(biased)
    loss_fn(twin, tokens).value.backward()
    tune(biased, PrunedBitFitConfig(KEPT))
    loss_fn(biased, tokens).value.backward()
    for name, entries in KEPT:
        gradient = biased.get_parameter(name.removesuffix("bias") + "bias_delta").grad
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad[list(entries)], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for name, p in biased.named_parameters() if not name.endswith("bias_delta"))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 5)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), lambda: nn.LayerNorm(5), conv1d]
)
def test_layer_computes_with_a_bias_changed_at_its_entries(make):
    torch.manual_seed(0)
    base = make().double()
    wrapped = SparseBias(base, (0, 3, 4))
    x = torch.randn(3, 2, 5, dtype=torch.float64).transpose(0, 1).contiguous()
    torch.testing.assert_close(wrapped(x), base(x), rtol=0, atol=0)
    nn.init.normal_(wrapped.bias_delta)
    change = torch.zeros(7 if base.weight.dim() == 2 else 5, dtype=torch.float64)
    change[[0, 3, 4]] = wrapped.bias_delta.detach()
    torch.testing.assert_close(wrapped(x), base(x) + change)
    torch.testing.assert_close(wrapped.bias, change if base.bias is None else base.bias + change)
    assert torch.autograd.gradcheck(
        lambda d: torch.func.functional_call(wrapped, {"bias_delta": d}, (x,)), wrapped.bias_delta
    )


def test_saved_as_one_number_for_each_entry(biased, tokens, perturb, tmp_path):
    biased.float()
    fresh = copy.deepcopy(biased)
    report = tune(biased, PrunedBitFitConfig(KEPT))
    assert report.trainable == 6
    save_adapter(perturb(biased), tmp_path / "adapter")
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == 4 * 6
    assert load_adapter(fresh, tmp_path / "adapter") == report
    assert torch.equal(fresh(tokens), biased(tokens))


def test_merged_bias_is_the_exact_sum_rounded_once():
    torch.manual_seed(0)
    wrapped = SparseBias(nn.Linear(4, 64, dtype=torch.bfloat16), tuple(range(64)))
    nn.init.normal_(wrapped.bias_delta)
    exact = wrapped.base.bias.double() + wrapped.bias_delta.double()
    assert torch.equal(wrapped.folded()["bias"], exact.to(torch.bfloat16))


def test_merged_once_rounded_unmerged_and_unloaded_bit_for_bit(biased, tokens, perturb):
    biased.to(torch.bfloat16)
    base, outputs = copy.deepcopy(biased.state_dict()), biased(tokens)
    tune(biased, PrunedBitFitConfig(KEPT))
    up = perturb(biased).layers[0].mlp.up_proj
    assert up.bias_delta.dtype == torch.float32
    exact = up.base.bias.double()
    exact[[0, 3, 23]] += up.bias_delta.double()
    tuned, state = biased(tokens), copy.deepcopy(biased.state_dict())
    merge(biased, keep=True)
    torch.testing.assert_close(biased.layers[0].mlp.up_proj.bias, exact.to(torch.bfloat16), rtol=0, atol=0)
    unmerge(biased)
    assert all(torch.equal(tensor, state[name]) for name, tensor in biased.state_dict().items())
    assert torch.equal(biased(tokens), tuned)
    unload(biased)
    assert all(torch.equal(tensor, base[name]) for name, tensor in biased.state_dict().items())
    assert torch.equal(biased(tokens), outputs)


def test_stacked_with_lora(biased, tokens, perturb):
    tune(biased, LoraConfig(rank=2, targets=("up_proj",)), "lora")
    perturb(biased)
    tune(biased, PrunedBitFitConfig(KEPT), "biases")
    expected = perturb(biased, seed=3)(tokens)
    merge(biased)
    torch.testing.assert_close(biased(tokens), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_without_a_bias_can_train_entries_but_not_merge_them(decoder, tokens, perturb):
    outputs = decoder(tokens)
    tune(decoder, PrunedBitFitConfig((("layers.1.mlp.up_proj.bias", (1, 2)),)))
    assert torch.equal(decoder(tokens), outputs)
    changed = perturb(decoder)(tokens)
    with pytest.raises(CannotMerge, match="the layer has no bias that a trained change could be folded into"):
        merge(decoder)
    assert torch.equal(decoder(tokens), changed)
    unload(decoder)
    assert torch.equal(decoder(tokens), outputs) and decoder.layers[1].mlp.up_proj.bias is None


def test_a_layer_in_two_places_has_one_change():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert tune(model, PrunedBitFitConfig((("0.bias", (1,)),))).trainable == 1
    assert model[0] is model[2] and isinstance(model[0], SparseBias)
    unload(model)
    with pytest.raises(ValueError, match=r"2.bias is a bias that is named already, of a layer in several places"):
        tune(model, PrunedBitFitConfig((("0.bias", (1,)), ("2.bias", (1,)))))


# bad input


def test_scores_that_cannot_be(biased, tokens, loss_fn):
    with pytest.raises(ValueError, match="nothing to score: this Decoder is not tuned"):
        BiasScores(biased)
    tune(biased, BitFitConfig(("norm.bias", UP)))
    scores = BiasScores(biased)
    with pytest.raises(ValueError, match=r"(?s)call update\(\) after backward and before zero_grad.*norm.bias"):
        scores.update()
    with pytest.raises(ValueError, match="after 0 steps the scores are all 0"):
        scores.keep_vectors(1)
    loss_fn(biased, tokens).value.backward()
    scores.update()  # nothing has moved yet
    with pytest.raises(ValueError, match="after 1 steps the scores are all 0"):
        scores.keep_entries(0.5)
    for wrong in (0, 3, 0.0, 1.5, True, -1):
        with pytest.raises(ValueError, match="a whole number from 1 to 2, or a fraction"):
            scores.keep_vectors(wrong)
    with torch.no_grad():
        biased.norm.bias.fill_(float("nan"))
    scores.update()
    with pytest.raises(ValueError, match="after 2 steps the scores are not finite"):
        scores.keep_vectors(1)
    unload(biased)
    tune(biased, FullConfig())
    with pytest.raises(ValueError, match="'default' is full: only the biases of BitFit can be scored"):
        BiasScores(biased)


def test_configs_and_models_that_do_not_fit(biased):
    with pytest.raises(ValueError) as error:
        PrunedBitFitConfig((("a.bias", ()), ("b.bias", (3, 1)), ("b.bias", (-1,)), ("c.bias", (1.0,))))
    for name, entries in (("a", "()"), ("b", "(3, 1)"), ("b", "(-1,)"), ("c", "(1.0,)")):
        assert f"kept: {name}.bias: rising places from 0, at least one, not {entries}" in str(error.value)
    assert "kept: a bias is named twice" in str(error.value)
    with pytest.raises(ValueError, match="kept: names with a tuple of places each, not 'up_proj'"):
        PrunedBitFitConfig("up_proj")
    kept = ((UP, (24,)), ("layers.0.mlp.bias", (0,)), ("embed_positions.weight", (0,)), ("norm.bias", (1,)))
    before = list(biased.state_dict())
    with pytest.raises(ValueError) as error:
        tune(biased, PrunedBitFitConfig(kept, trainable=("norm", "head")))
    assert "these entries do not fit this Decoder, which is unchanged" in str(error.value)
    assert f"{UP} has 24 entries: there is no place 24" in str(error.value)
    assert "layers.0.mlp.bias is no bias of a linear layer or layer norm" in str(error.value)
    assert "embed_positions.weight is no bias" in str(error.value)
    assert "norm.bias is in `trainable` too, where all of it trains" in str(error.value)
    assert "'head' matches no module (in trainable)" in str(error.value)
    with pytest.raises(ValueError, match="kept: no bias is named; BiasScores"):
        tune(biased, PrunedBitFitConfig())
    assert list(biased.state_dict()) == before


def test_a_tied_bias_is_refused():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    with pytest.raises(ValueError, match=r"0.bias is tied with another parameter"):
        tune(nn.Sequential(first, second), PrunedBitFitConfig((("0.bias", (1,)),)))


def test_config_survives_json():
    config = PrunedBitFitConfig(KEPT, trainable=("lm_head",))
    assert from_dict(PrunedBitFitConfig, to_dict(config)) == config
