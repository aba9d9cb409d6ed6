"""Our recurrent layers against torch's own, forward and backward, with the same weights.

    python benchmarks/run.py recurrent

torch runs an LSTM on the CPU through oneDNN, one fused kernel for all steps; its RNN is a loop of library calls in C++.
"""

from functools import partial

import torch
from common import Goal, compare, same_gradients
from torch import Tensor, nn

from minillm.layers import Recurrent

BATCH, LENGTH, SIZE = 32, 128, 256

GOALS = [
    Goal("LSTM layer, forward + backward / torch.nn.LSTM", ("lstm", "time_ratio"), 1.35),
    Goal("RNN layer, forward + backward / torch.nn.RNN", ("rnn", "time_ratio"), 1.35),
]
PEERS = {"lstm": nn.LSTM, "rnn": nn.RNN}


def pair(cell: str) -> tuple[Recurrent, nn.RNNBase]:
    """Ours and torch's with equal weights; ours has one bias where torch adds two."""
    torch.manual_seed(0)
    ours, theirs = Recurrent(SIZE, SIZE, cell=cell), PEERS[cell](SIZE, SIZE, batch_first=True)
    mine = ours.layers[0][0]
    with torch.no_grad():
        mine.input_proj.weight.copy_(theirs.weight_ih_l0)
        mine.hidden_proj.weight.copy_(theirs.weight_hh_l0)
        mine.input_proj.bias.copy_(theirs.bias_ih_l0 + theirs.bias_hh_l0)
    return ours, theirs


def forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    x.grad = None
    layer.zero_grad()
    layer(x)[0].backward(upstream)


def gradients(layer: Recurrent | nn.RNNBase, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    forward_backward(layer, x, upstream)
    if isinstance(layer, Recurrent):
        cell = layer.layers[0][0]
        weights = cell.input_proj.weight, cell.hidden_proj.weight, cell.input_proj.bias
    else:
        weights = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0
    names = ("input weight", "recurrent weight", "bias")
    return {"x": x.grad, **{name: weight.grad for name, weight in zip(names, weights, strict=True)}}


def measure(repeats: int = 15) -> dict:
    result = {}
    for cell in PEERS:
        ours, theirs = pair(cell)
        x, upstream = torch.randn(BATCH, LENGTH, SIZE, requires_grad=True), torch.randn(BATCH, LENGTH, SIZE)
        same_gradients(gradients(ours, x, upstream), gradients(theirs, x, upstream), tolerance=1e-5)
        sides = {"minillm": partial(forward_backward, ours, x, upstream)}
        sides["torch"] = partial(forward_backward, theirs, x, upstream)
        result[cell] = compare(sides, "minillm", "torch", repeats=repeats)
    return result
