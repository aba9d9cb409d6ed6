"""Gradients over time, against plain autograd and against the powers of a matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models import Decoder, ModelConfig
from minillm.models.gradient_flow import gradient_flow
from minillm.models.recurrent import RecurrentConfig, RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder
from minillm.recipes.gradient_flow_plot import plot_gradient_flow

EXACT = dict(rtol=1e-9, atol=1e-14)  # float64, gradients that have shrunk over some steps


def linear_rnn(recurrent: Tensor, activation: str = "linear") -> RecurrentLM:
    size = len(recurrent)
    model = RecurrentLM(RecurrentConfig(vocab_size=7, hidden_size=size, cell="rnn", activation=activation)).double()
    with torch.no_grad():
        model.layers[0][0].hidden_proj.weight.copy_(recurrent)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 7, (3, 8))


def test_a_linear_rnn_follows_the_powers_of_its_matrix(tokens):
    """d loss_t / d h_{t-k} = (W^T)^k d loss_t / d h_t, and d loss_t / d h_t = E^T (softmax(logits) - one-hot)."""
    W = torch.randn(5, 5).double() * 0.5
    model, max_lag = linear_rnn(W), 4
    error = model(tokens[:, :-1]).softmax(-1) - F.one_hot(tokens[:, 1:], 7)
    gradient = (error @ model.lm_head.weight)[:, max_lag:]  # (B, t, D)
    expected = [(gradient @ torch.linalg.matrix_power(W, k)).norm(dim=-1).mean() for k in range(max_lag + 1)]
    torch.testing.assert_close(gradient_flow(model, tokens, max_lag), torch.stack(expected), **EXACT)


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("radius", [0.5, 1.5])
def test_the_spectral_radius_is_the_slope(radius, activation):
    """With W = radius x a rotation of the axes the norm changes by exactly that factor per step.

    A permutation has no negative entry, so with positive inputs a relu is never off and the net is linear.
    """
    model = linear_rnn(radius * torch.eye(6).double().roll(1, 0), activation)
    with torch.no_grad():
        model.embed_tokens.weight.abs_()
        model.layers[0][0].input_proj.weight.abs_()
    flow = gradient_flow(model, torch.randint(0, 7, (2, 24)), 20)
    expected = flow[0] * radius ** torch.arange(21.0).double()
    torch.testing.assert_close(flow, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize("tied", [False, True])
def test_recurrent_equals_autograd_at_one_position(cell, tied):
    """The state after step s, as a leaf, from which the rest of the row is read: so nothing of ours is differentiated.

    One position: with max_lag = 5 and 6 losses, t = 5 alone counts. Cells are written out, two layers by hand.
    """
    config = RecurrentConfig(
        vocab_size=7, hidden_size=4, embed_size=3, num_layers=2, cell=cell, dropout=0.5, tie_embeddings=tied
    )
    model, tokens = RecurrentLM(config).double(), torch.randint(0, 7, (1, 7))
    flow = gradient_flow(model, tokens, 5)
    assert model.training  # and dropout was off
    torch.testing.assert_close(gradient_flow(model.requires_grad_(False), tokens, 5), flow, **EXACT)
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell]
    theirs = kind(3, 4, 2, batch_first=True).double()
    with torch.no_grad():
        for depth, (ours,) in enumerate(model.layers):
            getattr(theirs, f"weight_ih_l{depth}").copy_(ours.input_proj.weight)
            getattr(theirs, f"weight_hh_l{depth}").copy_(ours.hidden_proj.weight)
            getattr(theirs, f"bias_ih_l{depth}").copy_(ours.input_proj.bias)
            getattr(theirs, f"bias_hh_l{depth}").zero_()
    x = model.embed_tokens(tokens[:, :6]).detach()
    for lag in range(6):
        _, state = theirs(x[:, : 6 - lag])
        h = (state if cell == "rnn" else state[0]).detach().requires_grad_()
        start = h if cell == "rnn" else (h, state[1].detach())
        last = theirs(x[:, 6 - lag :], start)[0][:, -1] if lag else h[-1]
        loss = F.cross_entropy(model.lm_head(model.out_proj(last)), tokens[:, 6])
        torch.testing.assert_close(flow[lag], torch.autograd.grad(loss, h)[0].norm(), **EXACT)


def test_mean_over_batch_and_positions(tokens):
    model = linear_rnn(torch.randn(5, 5).double() * 0.4, "tanh")
    rows = torch.stack([gradient_flow(model, tokens[b : b + 1], 5) for b in range(3)])
    torch.testing.assert_close(gradient_flow(model, tokens, 5), rows.mean(0), **EXACT)  # losses 5 and 6
    only = [gradient_flow(model, tokens[:, : t + 2], t)[:6] for t in (5, 6)]  # loss t alone
    torch.testing.assert_close(gradient_flow(model, tokens, 5), torch.stack(only).mean(0), **EXACT)


def test_decoder_equals_autograd_at_one_position():
    model = Decoder(ModelConfig(vocab_size=7, hidden_size=8, num_layers=2, num_heads=2, max_positions=8)).double()
    tokens = torch.randint(0, 7, (1, 7))
    embeds = model.embed_tokens(tokens[:, :6]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(embeds=embeds)[:, 5], tokens[:, 6]), embeds)
    torch.testing.assert_close(gradient_flow(model, tokens, 5), gradient[0].norm(dim=-1).flip(0), **EXACT)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_encoder_decoder_equals_autograd_at_one_position(cell):
    """The decoder's inputs are the start id and the tokens before; its source and its target are the tokens."""
    model = RecurrentEncoderDecoder(
        RecurrentConfig(vocab_size=7, hidden_size=4, cell=cell, decoder_start_id=2)
    ).double()
    tokens = torch.randint(0, 7, (1, 6))
    memory = model.encode(tokens).detach().requires_grad_()
    inputs = torch.cat([torch.tensor([[2]]), tokens[:, :5]], dim=1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(None, inputs, memory=memory)[:, 5], tokens[:, 5]), memory)
    torch.testing.assert_close(gradient_flow(model, tokens, 5), gradient[0].norm(dim=-1).flip(0), **EXACT)


def test_one_call_draws_all_models(tmp_path, tokens):
    """RNNs vanish and explode; attention reaches every step as well as the last."""
    eye = torch.eye(5).double()
    models = {
        "RNN 0.5": linear_rnn(0.5 * eye),
        "RNN 1.5": linear_rnn(1.5 * eye),
        "LSTM": RecurrentLM(RecurrentConfig(vocab_size=7, hidden_size=5)),
        "attention": RecurrentEncoderDecoder(RecurrentConfig(vocab_size=7, hidden_size=5)),
        "transformer": Decoder(ModelConfig(vocab_size=7, hidden_size=8, num_layers=1, num_heads=2, max_positions=8)),
    }
    path = tmp_path / "flow.png"
    with torch.no_grad():  # a plot is often asked for where gradients are off
        curves = plot_gradient_flow(models, tokens, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000
    assert list(curves) == list(models) and all(curve.shape == (5,) for curve in curves.values())
    torch.testing.assert_close(curves["RNN 0.5"], 0.5 ** torch.arange(5.0).double(), **EXACT)
    torch.testing.assert_close(curves["RNN 1.5"], 1.5 ** torch.arange(5.0).double(), **EXACT)
    assert curves["attention"][4] > 0.3 > 4 * curves["RNN 0.5"][4]


def test_bad_input_is_named(tmp_path, tokens):
    model = linear_rnn(torch.eye(5))
    for lag in (7, -1):
        with pytest.raises(ValueError, match=rf"max_lag={lag}: .* 7 losses, so it must be in 0..6"):
            gradient_flow(model, tokens, lag)
    with pytest.raises(ValueError, match=r"where Linear keeps its past; it knows RecurrentLM, .*Decoder"):
        gradient_flow(nn.Linear(2, 2), tokens, 1)
    with pytest.raises(ValueError, match="no models to draw"):
        plot_gradient_flow({}, tokens, tmp_path / "flow.png")
    with torch.no_grad():
        model.embed_tokens.weight.zero_()  # all logits are 0 and the gradient cannot pass the head
    with pytest.raises(ValueError, match="lag 0 that is zero or not finite: dead"):
        plot_gradient_flow({"dead": model}, tokens, tmp_path / "flow.png")
