"""MoLA against an explicit loop over tokens and experts in float64, and against plain LoRA."""

import copy
import math

import pytest
import torch
from torch import nn

from minillm.config import from_dict, to_dict
from minillm.ops import use_backend
from minillm.peft import LoRALinear, auxiliary_loss, num_parameters, tune, unload
from minillm.peft.merge import merge
from minillm.peft.method import CannotMerge
from minillm.peft.mola import SHAPES, MolaConfig
from minillm.peft.mola_linear import MoLALinear
from minillm.peft.record import tunings_of


def layer(experts=4, rank=2, top_k=2, *, d_in=5, d_out=7, dropout=0.0, dtype=torch.float64, conv1d=False):
    """A layer with random A, B and router, as after training; alpha = 3 is not the rank."""
    torch.manual_seed(0)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(d_out, d_in).to(dtype)
    else:
        base = nn.Linear(d_in, d_out, dtype=dtype)
    made = MoLALinear(base.requires_grad_(False), experts, rank, 3.0, top_k=top_k, dropout=dropout)
    with torch.no_grad():
        for parameter in (made.lora_A, made.lora_B, made.router):
            parameter.normal_()
    return made


def by_hand(layer, x, dropped=None):
    """One token after the other, one chosen expert after the other."""
    rows = []
    dropped = x if dropped is None else dropped
    for token, low in zip(x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1]), strict=True):
        p = torch.softmax(torch.stack([token @ layer.router[e] for e in range(layer.experts)]), dim=0)
        chosen = sorted(range(layer.experts), key=lambda e: -p[e].item())[: layer.top_k]
        y = layer.base(token[None])[0]
        for e in chosen:
            weight = p[e] / sum(p[c] for c in chosen)
            y = y + weight * (3.0 / layer.rank) * (layer.lora_B[e] @ (layer.lora_A[e] @ low))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def balance_by_hand(p, top_k, real):
    """N sum_e f_e P_e over the real tokens, counted one after the other; p (tokens, N)."""
    p = [row for row, counts in zip(p.tolist(), real, strict=True) if counts]
    experts = len(p[0])
    choices = [e for row in p for e in sorted(range(experts), key=lambda e: -row[e])[:top_k]]
    return experts * sum(choices.count(e) / len(choices) * sum(row[e] for row in p) / len(p) for e in range(experts))


# ---------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rows", [(1,), (6,), (1, 1), (2, 3)])
@pytest.mark.parametrize("experts, top_k", [(4, 2), (4, 1), (3, 3), (1, 1)])
def test_is_the_loop_over_tokens(rows, experts, top_k, conv1d):
    ours = layer(experts, top_k=top_k, conv1d=conv1d)
    x = torch.randn(*rows, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), by_hand(ours, x))


def test_inputs_that_are_not_contiguous():
    ours = layer()
    for x in (torch.randn(5, 6).double().t(), torch.randn(3, 2, 5).double().transpose(0, 1)):
        assert not x.is_contiguous()
        torch.testing.assert_close(ours(x), by_hand(ours, x))


@pytest.mark.parametrize("experts, top_k", [(4, 2), (4, 1), (3, 3)])
def test_gradients_are_those_of_the_loop(experts, top_k):
    ours = layer(experts, top_k=top_k)
    results = []
    for run in (ours, lambda x: by_hand(ours, x)):
        x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaves = (ours.lora_A, ours.lora_B, ours.router, x)
        results.append(torch.autograd.grad(run(x).square().sum(), leaves))
    torch.testing.assert_close(results[0], results[1])
    # with one expert for each token its weight is p / p = 1, so only the balance loss teaches the router
    assert (results[0][2].abs().max() > 1e-6) == (top_k > 1)


def test_weights_of_the_chosen_sum_to_one():
    """Toy mistake: the k largest probabilities as they are, which make every update smaller as experts become more."""
    ours = layer(6, top_k=2)
    gates = ours._gates(torch.randn(4, 5, dtype=torch.float64))
    torch.testing.assert_close(gates.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (gates > 0).sum(-1).tolist() == [2] * 4


def test_each_token_chooses_for_itself():
    """Toy mistake: one choice for the whole sequence."""
    ours = layer(4, top_k=1)
    x = torch.randn(1, 40, 5, dtype=torch.float64)
    assert len({tuple(row) for row in (ours._gates(x)[0] > 0).tolist()}) == 4
    torch.testing.assert_close(ours(x)[:, 3:4], ours(x[:, 3:4]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_expert_is_plain_lora(dropout):
    ours = layer(1, 3, 1, dropout=dropout, dtype=torch.float32)
    plain = LoRALinear(ours.base, 3, 3.0, dropout=dropout)
    with torch.no_grad():
        plain.lora_A.copy_(ours.lora_A[0])
        plain.lora_B.copy_(ours.lora_B[0])
    x = torch.randn(2, 6, 5)
    results = []
    for each in (ours, plain):
        torch.manual_seed(1)
        with use_backend("reference"):  # the same products in the same order
            y = each(x)
        results.append((y, *(g.view(-1) for g in torch.autograd.grad(y.square().sum(), (each.lora_A, each.lora_B)))))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1])


def test_dropout_is_on_the_experts_input_not_on_the_routers():
    ours = layer(dropout=0.5)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, by_hand(ours, x, nn.functional.dropout(x, 0.5)))
    torch.testing.assert_close(ours.eval()(x), by_hand(ours, x))


def test_start():
    """Toy mistake: kaiming_uniform_ on the stacked A, whose fan-in is then R * Din: a start sqrt(R) times too small."""
    base = nn.Linear(64, 64)
    ours, x = MoLALinear(base, 5, 16, 16.0), torch.randn(3, 64)
    assert torch.equal(ours(x), base(x)) and not ours.lora_B.count_nonzero()
    for parameter in (ours.lora_A, ours.router):
        assert parameter.abs().max() <= 1 / 8 and abs(parameter.std().item() - 1 / 8 / math.sqrt(3)) < 0.006
    assert not torch.equal(ours.lora_A[0], ours.lora_A[1])


def test_router_is_in_float32_under_autocast():
    """In bfloat16, with 8 bits, near ties would be broken by chance."""
    ours = layer(dtype=torch.float32)
    x = torch.randn(50, 5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours._gates(x)
    assert cast.dtype == torch.float32 and torch.equal(cast, ours._gates(x))


def test_bfloat16_base():
    ours = MoLALinear(nn.Linear(6, 6).bfloat16(), 3, 2, 4.0)
    y = ours(torch.randn(4, 6).bfloat16())
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in (ours.lora_A, ours.lora_B, ours.router)} == {torch.float32}


def test_layer_refuses_what_it_cannot_have():
    with pytest.raises(ValueError, match="top_k=3 experts for each token, but it has 2"):
        MoLALinear(nn.Linear(5, 7), 2, 2, 4.0, top_k=3)
    with pytest.raises(ValueError, match=r"rank 6 is outside 1\.\.5"):
        MoLALinear(nn.Linear(5, 7), 2, 6, 4.0)


# ---------------------------------------------------------------------------------------------------- the balance loss


def routed(probabilities, top_k):
    """A layer whose router has just said this."""
    ours = layer(probabilities.shape[-1], top_k=top_k)
    ours.routing.probabilities, ours.routing.chosen = probabilities, probabilities.topk(top_k).indices
    return ours


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_is_the_formula_over_real_tokens(top_k):
    """Toy mistake (the published code): padding is counted, so what the router makes of it is balanced too."""
    ours = layer(4, top_k=top_k)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    p = torch.softmax(x @ ours.router.t(), -1).flatten(0, 1)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    for given, real in ((mask, mask.flatten().tolist()), (None, [True] * 18)):
        ours(x)
        assert ours.balance(given).item() == pytest.approx(balance_by_hand(p, top_k, real), rel=1e-12)
    ours(x)
    left = ours.balance(torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)[:, :6])
    padded = torch.cat([x, torch.randn(3, 4, 5).double()], 1)
    ours(padded)
    longer = ours.balance(torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1))
    torch.testing.assert_close(longer, left)  # what stands in the padding changes nothing


def test_balance_is_one_when_all_are_used_alike_and_more_when_not():
    even = torch.full((4, 4), 0.25, dtype=torch.float64) + 0.01 * torch.eye(4, dtype=torch.float64) - 0.0025
    assert routed(even, 1).balance(None).item() == pytest.approx(1, rel=1e-12)
    sure = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4, dtype=torch.float64)
    assert routed(sure, 2).balance(None).item() == pytest.approx(2, rel=1e-12)  # N / k


def test_balance_gradient_spreads_the_choices():
    """Descent on the balance loss alone brings a collapsed router near 1."""
    torch.manual_seed(0)
    ours = layer(4, top_k=1)
    x = torch.randn(200, 5, dtype=torch.float64)
    x[:, 0] = 1.0
    with torch.no_grad():
        ours.router.zero_()
        ours.router[0, 0] = 3.0
        ours.router[:, 1:] = 0.1 * torch.randn(4, 4)
    optimizer, losses = torch.optim.Adam([ours.router], lr=0.1), []
    for _ in range(60):
        ours(x)
        loss = ours.balance(None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 1.2


def test_balance_gradient_is_the_formulas():
    """f is counted, so it is a constant; the gradient goes through P. Also to the layers below, through x."""
    ours = layer(4, top_k=2)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    ours(x)
    ours_grads = torch.autograd.grad(ours.balance(None), (ours.router, x))
    p = torch.softmax(x @ ours.router.t(), -1).flatten(0, 1)
    f = torch.zeros(4, dtype=torch.float64)
    for row in p.topk(2).indices:
        f[row] += 1 / 12
    expected = torch.autograd.grad(4 * (f * p.mean(0)).sum(), (ours.router, x))
    torch.testing.assert_close(ours_grads, expected)


def test_no_real_token_is_no_balance():
    ours = layer()
    ours(torch.randn(2, 3, 5, dtype=torch.float64))
    assert ours.balance(torch.zeros(2, 3, dtype=torch.bool)).item() == 0


def test_rows_without_positions_take_a_flattened_mask():
    ours = layer()
    x, mask = torch.randn(6, 5, dtype=torch.float64), torch.tensor([[True, False, True], [True, True, False]])
    ours(x)
    flat = ours.balance(mask)
    ours(x.view(2, 3, 5))
    torch.testing.assert_close(flat, ours.balance(mask))


def test_a_layer_that_saw_another_sequence_counts_all_of_it():
    ours, x = layer(), torch.randn(2, 4, 5, dtype=torch.float64)
    ours(x)
    all_of_it = ours.balance(None)
    ours(x)
    assert torch.equal(ours.balance(torch.ones(2, 3, dtype=torch.bool)), all_of_it)


def test_balance_is_of_training_passes_only():
    ours = layer()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
    ours.eval()(x)
    assert ours.balance(None) is None
    ours.train()(x)
    assert ours.balance(None) is not None and ours.balance(None) is None  # and it is forgotten then


CONFIG = MolaConfig(per_layer=(2, 4, 3), rank=3, alpha=5.0, balance=0.01)


def test_penalty_is_the_sum_over_the_layers(decoder, tokens, perturb):
    """Toy mistake: the mean over layers, or one term for all routers together."""
    tune(decoder, CONFIG)
    perturb(decoder)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 6:] = False
    assert auxiliary_loss(decoder, mask) is None  # nothing has run yet
    decoder(tokens, mask=mask)
    terms = []
    for _, wrapper in tunings_of(decoder)["default"].wrappers:
        p = wrapper.routing.probabilities.detach().flatten(0, 1)
        terms.append(balance_by_hand(p, 2, mask.flatten().tolist()))
    assert len(terms) == 6 and len({round(term, 3) for term in terms}) > 3
    assert auxiliary_loss(decoder, mask).item() == pytest.approx(0.01 * sum(terms), rel=1e-5)


def test_penalty_with_gradient_checkpointing(decoder, tokens, perturb):
    """The same gradients; and no recomputed pass is kept, with the activations that checkpointing saves."""
    tune(decoder, CONFIG)
    perturb(decoder)
    gradients = []
    for decoder.gradient_checkpointing in (False, True):
        decoder.zero_grad()
        loss = decoder(tokens).square().mean()
        (loss + auxiliary_loss(decoder, None)).backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters() if p.requires_grad})
        assert all(w.routing.probabilities is None for _, w in tunings_of(decoder)["default"].wrappers)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_without_a_balance_loss_nothing_is_kept(decoder, tokens):
    tune(decoder, MolaConfig(per_layer=(2, 4, 3), rank=3, balance=0))
    decoder(tokens)
    assert auxiliary_loss(decoder) is None
    assert all(w.routing.probabilities is None for _, w in tunings_of(decoder)["default"].wrappers)


def test_a_copy_right_after_a_training_pass(decoder, tokens):
    """torch refuses to copy a tensor that is part of a graph; what the router said is no part of the model."""
    tune(decoder, CONFIG)
    decoder(tokens)
    again = copy.deepcopy(decoder)
    assert torch.equal(again(tokens), decoder(tokens))
    assert auxiliary_loss(copy.deepcopy(again), None) is None


# ---------------------------------------------------------------------------------------------------------- the experts


class Layers(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(depth))
        self.lm_head = nn.Linear(4, 4)


def experts(depth, **fields):
    model = Layers(depth)
    plan = MolaConfig(rank=2, targets=("q_proj",), **{"top_k": 1} | fields).plan(model)
    return [plan.parameters[f"layers.{i}.q_proj.router"].shape[0] for i in range(depth)]


@pytest.mark.parametrize(
    "shape, quarters",
    [
        ("triangle", [8, 6, 4, 2]),
        ("inverted-triangle", [2, 4, 6, 8]),
        ("hourglass", [8, 2, 2, 8]),
        ("diamond", [2, 8, 8, 2]),
        ("rectangle", [5, 5, 5, 5]),
    ],
)
def test_shapes_have_the_papers_numbers(shape, quarters):
    """32 layers in quarters of 8, 160 experts for each kind of target together, whatever the shape."""
    found = experts(32, shape=shape)
    assert found == [n for n in quarters for _ in range(8)] and sum(found) == 160
    assert experts(12, shape=shape, experts=7) == [n + 2 for n in quarters for _ in range(3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 7])
def test_shapes_at_other_depths(shape, depth):
    found = experts(depth, shape=shape)
    assert set(found) <= {5 + offset for offset in SHAPES[shape]}
    if shape in ("hourglass", "diamond"):
        assert found == found[::-1]
    elif shape != "rectangle":
        assert found == sorted(found, reverse=shape == "triangle")


def test_per_layer():
    assert experts(3, per_layer=(1, 4, 2)) == [1, 4, 2]
    with pytest.raises(ValueError, match=r"layers.\{0..3\}.q_proj: per_layer has 3 numbers, and layers 4 layers"):
        experts(4, per_layer=(1, 4, 2))


@pytest.mark.parametrize("stack", ["encoder.layers", "transformer.h", "bert.encoder.layer", "layers"])
def test_depth_is_read_from_the_path(stack):
    """The first number; others, as in T5's encoder.block.3.layer.0, are inside the layer."""
    config = MolaConfig(per_layer=(2, 3, 4), targets=("q",))
    names = [f"{stack}.{i}.layer.{j}.q" for i in range(3) for j in range(2)]
    assert list(config._counts(names).values()) == [2, 2, 3, 3, 4, 4]


def test_an_encoder_and_a_decoder_are_counted_each_by_itself():
    names = [f"encoder.layers.{i}.q" for i in range(4)] + [f"decoder.layers.{i}.q" for i in range(8)]
    counts = list(MolaConfig(targets=("q",))._counts(names).values())
    assert counts == [2, 4, 6, 8, 2, 2, 4, 4, 6, 6, 8, 8]


def test_a_target_outside_the_layers():
    with pytest.raises(ValueError, match=r'lm_head: is in no numbered layer.*give shape="rectangle" to have it too'):
        MolaConfig(targets=("lm_head",), rank=2).plan(Layers(4))
    plan = MolaConfig(targets=("lm_head",), rank=2, shape="rectangle", experts=3).plan(Layers(4))
    assert plan.parameters["lm_head.router"].shape == (3, 4)


def test_top_k_above_the_experts_of_some_layers_names_them():
    said = r"layers.\{0..1\}.q_proj: top_k=3 experts for each token, but it has 2\n"
    with pytest.raises(ValueError, match=said) as error:
        experts(8, top_k=3)
    assert "layers.2" not in str(error.value).partition("its linear layers")[0]


def test_count_by_formula(decoder):
    """N R (Din + Dout) + N Din: q_proj is 16 -> 16, up_proj 16 -> 20; a router Linear(Din, N) without bias."""
    config = MolaConfig(per_layer=(2, 4, 3), rank=3, targets=("q_proj", "mlp.up_proj"))
    expected = sum(n * 3 * (16 + 16) + n * 16 + n * 3 * (16 + 20) + n * 16 for n in (2, 4, 3))
    assert num_parameters(config, decoder) == expected == tune(decoder, config).trainable


def test_merging_is_refused_with_the_reason(decoder, tokens, perturb):
    tune(decoder, CONFIG)
    perturb(decoder)
    before = decoder(tokens)
    with pytest.raises(CannotMerge, match="which experts a token uses depends on the token, so no one weight does"):
        merge(decoder)
    assert torch.equal(decoder(tokens), before)


def test_unload(decoder, tokens, perturb):
    before = decoder(tokens)
    tune(decoder, CONFIG)
    unload(perturb(decoder))
    assert torch.equal(decoder(tokens), before)


def test_config_says_all_that_is_wrong():
    with pytest.raises(ValueError) as error:
        MolaConfig(0, "pyramid", (1, 0), top_k=0, rank=1.5, alpha=-1, targets=(), dropout=1, balance=-1)
    for line in (
        "experts: a whole number, at least 1, not 0",
        "shape: one of triangle, inverted-triangle, hourglass, diamond, rectangle, not 'pyramid'",
        "per_layer: a whole number, at least 1, for each layer, not (1, 0)",
        "top_k: a whole number, at least 1, not 0",
        "rank: a whole number, at least 1, not 1.5",
        "alpha: a number above 0, not -1",
        'targets: name at least one, such as "q_proj"',
        "dropout: a number in [0, 1), not 1",
        "balance: a number in [0, inf), not -1",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="experts: a diamond needs a mean of 4 at least, not 3"):
        MolaConfig(3, "diamond")


def test_config_survives_json():
    assert from_dict(MolaConfig, to_dict(CONFIG)) == CONFIG
