"""Recurrent layers against torch's with the same weights: outputs, states and every gradient, in float64."""

import math

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from minillm.layers import AdditiveAttention, LSTMCell, Recurrent, RNNCell, State

EXACT = dict(rtol=0, atol=1e-10)  # float64
PEERS = [("rnn", "tanh"), ("rnn", "relu"), ("lstm", "tanh")]


def torch_twin(ours: Recurrent) -> nn.RNNBase:
    """torch.nn.RNN or LSTM with the weights of `ours`; names as in `pairs`.

    torch adds a second bias to the recurrent product. It is drawn here at random and taken off the first one, so the
    sum of both is our only bias, and its gradient is that of each of them.
    """
    options = dict(batch_first=True, bidirectional=ours.directions == 2)
    cell = ours.layers[0][0]
    if isinstance(cell, LSTMCell):
        theirs = nn.LSTM(ours.input_size, ours.hidden_size, len(ours.layers), **options)
    else:
        theirs = nn.RNN(ours.input_size, ours.hidden_size, len(ours.layers), nonlinearity=cell.activation, **options)
    theirs = theirs.to(next(ours.parameters()).dtype)
    with torch.no_grad():
        for name, (mine, *others) in pairs(ours, theirs).items():
            if name.endswith("bias"):
                others[1].normal_()
                others[0].copy_(mine - others[1])
            else:
                others[0].copy_(mine)
    return theirs


def pairs(ours: Recurrent, theirs: nn.RNNBase) -> dict[str, tuple[nn.Parameter, ...]]:
    """Name of our parameter -> it, then torch's: weight_ih, weight_hh or both biases; the gates' order is the same."""
    found = {}
    for depth, layer in enumerate(ours.layers):
        for side, cell in enumerate(layer):
            ending = f"l{depth}" + "_reverse" * side
            matches = {
                "input_proj.weight": (cell.input_proj.weight, f"weight_ih_{ending}"),
                "hidden_proj.weight": (cell.hidden_proj.weight, f"weight_hh_{ending}"),
                "input_proj.bias": (cell.input_proj.bias, f"bias_ih_{ending}", f"bias_hh_{ending}"),
            }
            for name, (mine, *others) in matches.items():
                found[f"{depth}.{side}.{name}"] = (mine, *(getattr(theirs, other) for other in others))
    assert {id(mine) for mine, *_ in found.values()} == {id(p) for p in ours.parameters()}
    return found


def make(*args, **options) -> Recurrent:
    layer = Recurrent(*args, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def random_state(layer: Recurrent, batch_size: int) -> State:
    shape = (len(layer.layers) * layer.directions, batch_size, layer.hidden_size)
    made = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2)]
    return State(*made) if isinstance(layer.layers[0][0], LSTMCell) else State(made[0])


def tensors(state: State) -> list[Tensor]:
    return [x for x in state if x is not None]


def run_torch(theirs: nn.RNNBase, x: Tensor, state: State | None, lengths: list[int] | None) -> list[Tensor]:
    """Outputs, then the tensors of the final state."""
    start = None if state is None else state.h if state.c is None else tuple(state)
    if lengths is None:
        y, end = theirs(x, start)
    else:
        packed, end = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), start)
        y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
    return [y, *([end] if isinstance(end, Tensor) else end)]


def same_everywhere(ours: Recurrent, x: Tensor, lengths: list[int] | None = None, with_state: bool = True) -> None:
    """Outputs, final states, and the gradients of x, the initial state and all parameters, for a random upstream."""
    theirs, mine, other = torch_twin(ours), x.clone().requires_grad_(), x.clone().requires_grad_()
    state = random_state(ours, len(x)) if with_state else None
    twin_state = None if state is None else state.map(lambda s: s.detach().clone().requires_grad_())
    mask = None if lengths is None else torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    y, end = ours(mine, mask=mask, state=state)
    given, expected = [y, *tensors(end)], run_torch(theirs, other, twin_state, lengths)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    upstream = [torch.randn_like(b) for b in expected]
    torch.autograd.backward(given, upstream)
    torch.autograd.backward(expected, upstream)
    torch.testing.assert_close(mine.grad, other.grad, **EXACT)
    for a, b in zip(tensors(state or State(x)), tensors(twin_state or State(x)), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)
    for name, (parameter, *others) in pairs(ours, theirs).items():
        for match in others:
            torch.testing.assert_close(parameter.grad, match.grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cell, activation", PEERS)
@pytest.mark.parametrize("num_layers, bidirectional", [(1, False), (1, True), (3, False), (2, True)])
@pytest.mark.parametrize("batch_size, length, sizes", [(1, 1, (1, 1)), (1, 6, (3, 5)), (3, 1, (4, 2)), (4, 7, (5, 3))])
def test_equals_torch(cell, activation, num_layers, bidirectional, batch_size, length, sizes):
    ours = make(*sizes, num_layers, cell=cell, bidirectional=bidirectional, activation=activation)
    same_everywhere(ours, torch.randn(batch_size, length, sizes[0]).double())


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize("num_layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("lengths", [[1], [5, 7, 1], [7, 7], [2, 6, 6, 3]])  # also where no row is full
def test_rows_of_unequal_length_equal_torchs_packed_sequences(cell, num_layers, bidirectional, lengths):
    ours = make(4, 3, num_layers, cell=cell, bidirectional=bidirectional)
    same_everywhere(ours, torch.randn(len(lengths), 7, 4).double(), lengths)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_non_contiguous_input_and_no_initial_state(cell):
    x = torch.randn(7, 4, 3).double().transpose(0, 1)[:, ::2]  # (4, 4, 3)
    assert not x.is_contiguous()
    same_everywhere(make(3, 5, 2, cell=cell), x, with_state=False)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_on_the_left_gives_each_row_what_it_gets_alone(cell, bidirectional):
    ours = make(4, 3, 2, cell=cell, bidirectional=bidirectional)
    x, lengths = torch.randn(3, 6, 4).double(), (2, 6, 5)
    mask = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    start = random_state(ours, 3)
    y, end = ours(x, mask=mask, state=start)
    for row, length in enumerate(lengths):
        alone, state = ours(x[row : row + 1, 6 - length :], state=start.map(lambda s, r=row: s[:, r : r + 1]))
        torch.testing.assert_close(y[row : row + 1, 6 - length :], alone, **EXACT)
        assert not y[row, : 6 - length].any()
        for a, b in zip(tensors(end), tensors(state), strict=True):
            torch.testing.assert_close(a[:, row : row + 1], b, **EXACT)


def test_what_stands_in_the_padding_reaches_nothing_and_gets_no_gradient():
    ours = make(4, 3, 2, bidirectional=True)
    x, mask = torch.randn(2, 5, 4).double(), torch.tensor([[True] * 3 + [False] * 2, [False] + [True] * 4])
    other = torch.where(mask[..., None], x, 100 * torch.randn_like(x)).requires_grad_()
    (y, end), (z, other_end) = ours(x, mask=mask), ours(other, mask=mask)
    assert torch.equal(y, z) and torch.equal(end.h, other_end.h) and torch.equal(end.c, other_end.c)
    (z.sum() + other_end.h.sum()).backward()
    assert not other.grad[~mask].any() and other.grad[mask].all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_cell_equals_torch(activation):
    ours, theirs = RNNCell(4, 3, activation).double(), nn.RNNCell(4, 3, nonlinearity=activation).double()
    theirs.load_state_dict(
        {
            "weight_ih": ours.input_proj.weight,
            "weight_hh": ours.hidden_proj.weight,
            "bias_ih": torch.zeros(3),
            "bias_hh": ours.input_proj.bias.detach().normal_(),
        }
    )
    x, h = torch.randn(2, 4).double(), torch.randn(2, 3).double()
    torch.testing.assert_close(ours(x, State(h)).h, theirs(x, h), **EXACT)
    torch.testing.assert_close(ours(x).h, theirs(x), **EXACT)


def test_lstm_cell_equals_torch():
    ours, theirs = LSTMCell(4, 3).double(), nn.LSTMCell(4, 3).double()
    theirs.load_state_dict(
        {
            "weight_ih": ours.input_proj.weight,
            "weight_hh": ours.hidden_proj.weight,
            "bias_ih": torch.zeros(12),
            "bias_hh": ours.input_proj.bias.detach().normal_(),
        }
    )
    x, h, c = torch.randn(2, 4).double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
    for given, expected in ((ours(x, State(h, c)), theirs(x, (h, c))), (ours(x), theirs(x))):
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_open_forget_gates_keep_the_memory_and_start_half_open():
    """With f = 1, i = 0 and no input, c is copied; new cells have the forget bias 1, others 0."""
    cell = LSTMCell(2, 3).double()
    assert cell.input_proj.bias.tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
    with torch.no_grad():
        cell.input_proj.bias.copy_(torch.tensor([-1e3, 1e3, 0.0, 0.0]).repeat_interleave(3))
    state = State(torch.zeros(1, 3).double(), torch.randn(1, 3).double())
    start = state.c
    for _ in range(50):
        state = cell(torch.randn(1, 2).double(), state)
    assert torch.equal(state.c, start)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_a_sequence_in_pieces_is_the_sequence(cell):
    ours = make(4, 3, 2, cell=cell)
    x = torch.randn(2, 9, 4).double()
    whole, end = ours(x)
    state, parts = None, []
    for part in x.split([4, 1, 4], dim=1):
        y, state = ours(part, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    for a, b in zip(tensors(state), tensors(end), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_truncate_is_pieces_with_a_detached_state(cell):
    ours, x = make(4, 3, 2, cell=cell), torch.randn(2, 8, 4).double()
    start, upstream = random_state(ours, 2), torch.randn(2, 8, 3).double()
    y, _ = ours(x, state=start, truncate=3)
    given = torch.autograd.grad(y, [*ours.parameters(), *tensors(start)], upstream)
    state, parts = start, []
    for part in x.split(3, dim=1):
        z, state = ours(part, state=state)
        state = state.detach()
        parts.append(z)
    expected = torch.autograd.grad(torch.cat(parts, 1), [*ours.parameters(), *tensors(start)], upstream)
    torch.testing.assert_close(given, expected, **EXACT)
    full = torch.autograd.grad(ours(x, state=start)[0], list(ours.parameters()), upstream)
    assert not torch.allclose(full[1], given[1])  # the recurrent weight of the lowest layer


def test_dropout_acts_between_layers_only_and_only_in_training():
    x = torch.randn(2, 5, 4)
    stacked, single = Recurrent(4, 64, 2, dropout=0.5), Recurrent(4, 64, 1, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])
    lower = []
    stacked.layers[1][0].input_proj.register_forward_pre_hook(lambda module, args: lower.append(args[0]))
    assert not torch.equal(stacked(x)[0], stacked(x)[0])
    assert 0.3 < (lower[0] == 0).float().mean() < 0.7
    stacked.eval()
    assert torch.equal(stacked(x)[0], stacked(x)[0])


class Twice(nn.Module):
    """Stands for an adapter around a projection."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@pytest.mark.parametrize("projection", ["input_proj", "hidden_proj"])
def test_replaced_projections_are_called_and_trained(projection):
    ours, expected = make(4, 3), make(4, 3)
    expected.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in getattr(expected.layers[0][0], projection).parameters():
            parameter.mul_(2)
    setattr(ours.layers[0][0], projection, Twice(getattr(ours.layers[0][0], projection)))
    x = torch.randn(2, 5, 4).double()
    torch.testing.assert_close(ours(x)[0], expected(x)[0], **EXACT)
    ours(x)[0].sum().backward()
    expected(x)[0].sum().backward()
    given = getattr(ours.layers[0][0], projection).base.weight.grad
    torch.testing.assert_close(given, 2 * getattr(expected.layers[0][0], projection).weight.grad, **EXACT)


def test_a_frozen_recurrent_weight_gets_no_gradient_and_changes_no_other():
    ours, x = make(4, 3), torch.randn(2, 5, 4).double()
    expected = torch.autograd.grad(ours(x)[0].sum(), ours.layers[0][0].input_proj.weight)
    ours.layers[0][0].hidden_proj.requires_grad_(False)
    ours(x)[0].sum().backward()
    assert ours.layers[0][0].hidden_proj.weight.grad is None
    torch.testing.assert_close(ours.layers[0][0].input_proj.weight.grad, expected[0], **EXACT)


def test_compiling_changes_no_gradient(monkeypatch):
    ours, x = make(4, 3), torch.randn(2, 3, 4).double()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of shapes cannot be compiled
    compiled = torch.compile(ours, backend="aot_eager")
    given, expected = (torch.autograd.grad(f(x)[0].square().sum(), list(ours.parameters())) for f in (compiled, ours))
    torch.testing.assert_close(given, expected, **EXACT)


def test_additive_attention_is_its_formula():
    """score_j = v . tanh(W q + U m_j); weights = softmax over the real j; context = sum_j weight_j m_j, in loops."""
    layer = AdditiveAttention(3, 4, 5).double()
    q, memory = torch.randn(2, 3).double(), torch.randn(2, 6, 4).double()
    mask = torch.tensor([[True] * 6, [False] + [True] * 3 + [False] * 2])
    W, U, v = layer.q_proj.weight, layer.k_proj.weight, layer.score_proj.weight[0]
    weights, context = layer.weights(q, memory, mask=mask), layer(q, memory, mask=mask)
    for b in range(2):
        real = [j for j in range(6) if mask[b, j]]
        scores = {j: sum(v[a] * torch.tanh(W[a] @ q[b] + U[a] @ memory[b, j]) for a in range(5)) for j in real}
        total = sum(score.exp() for score in scores.values())
        expected = torch.stack([scores[j].exp() / total if j in real else torch.zeros(()).double() for j in range(6)])
        torch.testing.assert_close(weights[b], expected, **EXACT)
        torch.testing.assert_close(context[b], sum(expected[j] * memory[b, j] for j in real), **EXACT)
    torch.testing.assert_close(layer(q, memory, mask=mask, keys=layer.k_proj(memory)), context, **EXACT)


def test_additive_attention_by_hand():
    """W = U = v = 1; scores tanh(0 + 0) = 0 and tanh(0 + 1) = 0.761594, so weights 0.3183 and 0.6817."""
    layer = AdditiveAttention(1, 1, 1).double()
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    given = layer(torch.zeros(1, 1).double(), torch.tensor([[[0.0], [1.0]]]).double())
    assert given.item() == pytest.approx(math.exp(0.761594) / (1 + math.exp(0.761594)), abs=1e-6)


BAD = {
    "need \\(B, T, 4\\) with T at least 1": dict(x=torch.zeros(2, 5, 3)),
    "x has shape \\(2, 0, 4\\)": dict(x=torch.zeros(2, 0, 4)),
    "mask is \\(2, 4\\), x is \\(2, 5, 4\\)": dict(mask=torch.ones(2, 4, dtype=torch.bool)),
    "rows \\[1\\] have no real token": dict(mask=torch.tensor([[True] * 5, [False] * 5])),
    "rows \\[0\\] have padding between": dict(mask=torch.tensor([[True, False, True, True, False], [True] * 5])),
    "state.h has shape \\(1, 2, 3\\): need \\(2, 2, 3\\)": dict(
        state=State(torch.zeros(1, 2, 3), torch.zeros(2, 2, 3))
    ),
    "state.c has shape \\(2, 1, 3\\)": dict(state=State(torch.zeros(2, 2, 3), torch.zeros(2, 1, 3))),
    "state has h, LSTMCell needs h and c": dict(state=State(torch.zeros(2, 2, 3))),
    "mask is torch.float32: need torch.bool": dict(mask=torch.ones(2, 5)),
    "truncate=0": dict(truncate=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse some before
    given = {"x": torch.zeros(2, 5, 4)} | BAD[message]
    with pytest.raises(ValueError, match=message):
        Recurrent(4, 3, 2)(**given)


def test_all_that_is_wrong_is_in_one_error(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    state, mask = State(torch.zeros(1, 2, 3)), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"(?s)x has.*rows \[0, 1\] have no.*state has h.*truncate=-1"):
        Recurrent(4, 3, 2)(torch.zeros(2, 5, 3), mask=mask, state=state, truncate=-1)
    with pytest.raises(ValueError, match="state has h and c, RNNCell needs h"):
        RNNCell(4, 3)(torch.zeros(2, 4), State(torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"state.h has shape \(1, 3\): need \(2, 3\)"):
        RNNCell(4, 3)(torch.zeros(2, 4), State(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"truncate=2: .* one direction"):
        Recurrent(4, 3, bidirectional=True)(torch.zeros(2, 5, 4), truncate=2)


@pytest.mark.parametrize(
    "message, options",
    [
        ("cell='lsmt': did you mean lstm", dict(cell="lsmt")),
        ("activation='tahn': did you mean tanh", dict(cell="rnn", activation="tahn")),
        ("activation='relu' is for cell='rnn'", dict(activation="relu")),
        ("num_layers=0", dict(num_layers=0)),
        ("hidden_size=0", dict(hidden_size=0)),
    ],
)
def test_layers_that_cannot_be_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        Recurrent(**{"input_size": 4, "hidden_size": 3} | options)
