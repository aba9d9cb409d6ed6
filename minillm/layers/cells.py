"""The cells of recurrent networks: each reads one vector and updates its state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minillm.config import nearest

CELL_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda x: x}  # linear: for studying gradients


class State(NamedTuple):
    """What a recurrent net remembers: `h`, which is also its output, and for an LSTM the memory cell `c`.

    Both are (B, D) for one cell, (layers x directions, B, D) for a stack: layer by layer, forward before backward.
    """

    h: Tensor
    c: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """The state with `function` applied to h and, if there is one, to c."""
        return State(function(self.h), None if self.c is None else function(self.c))

    def detach(self) -> "State":
        """The same values, through which no gradient passes."""
        return self.map(Tensor.detach)

    def where(self, keep: Bool[Tensor, "B 1"], other: "State") -> "State":
        """This state in the rows where `keep` is True, `other` in the rest."""
        pairs = zip(self, other, strict=True)
        return State(*(None if new is None else torch.where(keep, new, old) for new, old in pairs))


class Cell(nn.Module, ABC):
    """What the cells share: two projections, of the input and of the state, kept apart so that the first needs no loop.

    torch's cells add a second, redundant bias to the second projection; ours is the sum of the two.
    """

    gates: int  # how many vectors of hidden_size a step computes
    remembers: str  # the names of the state's tensors

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"input_size={input_size} and hidden_size={hidden_size} must be at least 1")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.input_proj = nn.Linear(input_size, self.gates * hidden_size)
        self.hidden_proj = nn.Linear(hidden_size, self.gates * hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: uniform within 1/sqrt(hidden_size), as torch does; biases 0."""
        bound = 1 / math.sqrt(self.hidden_size)
        for projection in (self.input_proj, self.hidden_proj):
            projection.weight.uniform_(-bound, bound)
        self.input_proj.bias.zero_()

    def forward(self, x: Float[Tensor, "B I"], state: State | None = None) -> State:
        """The state after reading x; from zeros if no state is given."""
        state = self.zero_state(x) if state is None else state
        raise_if(state_wrong(state, (len(x), self.hidden_size), self))
        return self.update(self.input_proj(x) + self.hidden_proj(state.h), state)

    def zero_state(self, x: Float[Tensor, "B *T I"]) -> State:
        """The state before anything is read, for as many rows as x has."""
        return State(*(x.new_zeros(len(x), self.hidden_size) for _ in self.remembers))

    @abstractmethod
    def update(self, z: Float[Tensor, "B Z"], state: State) -> State:
        """The state that follows `state`; z is the sum of both projections."""


class RNNCell(Cell):
    """h = tanh(W_x x + b + W_h h). Source: Elman 1990 (Cognitive Science 14, 179-211).

    `activation`: tanh, relu (Le et al. 2015, arXiv:1504.00941) or linear.
    """

    gates, remembers = 1, "h"

    def __init__(self, input_size: int, hidden_size: int, activation: str = "tanh"):
        super().__init__(input_size, hidden_size)
        if activation not in CELL_ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: did you mean {nearest(activation, CELL_ACTIVATIONS)}?")
        self.activation = activation

    def update(self, z: Float[Tensor, "B Z"], state: State) -> State:
        return State(CELL_ACTIVATIONS[self.activation](z))


class LSTMCell(Cell):
    """c = f c + i g and h = o tanh(c), where i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W_x x + b + W_h h.

    The gates stand in this order in both matrices, as in torch. Along c the gradient is only multiplied with the forget
    gate f, so f near 1 keeps it alive; f's bias therefore starts at 1 (Jozefowicz et al. 2015, section 3.2).
    Source: Hochreiter & Schmidhuber 1997; with forget gate: Gers et al. 2000 (Neural Computation 12, 2451-2471).
    """

    gates, remembers = 4, "hc"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.input_proj.bias[self.hidden_size : 2 * self.hidden_size] = 1.0

    def update(self, z: Float[Tensor, "B Z"], state: State) -> State:
        i, f, g, o = z.chunk(4, dim=-1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        return State(o.sigmoid() * c.tanh(), c)


CELLS = {"rnn": RNNCell, "lstm": LSTMCell}


def state_wrong(state: State, shape: tuple[int, ...], cell: Cell) -> list[str]:
    """What keeps `cell`, or a stack of such cells, from going on with `state`, whose tensors should have `shape`."""
    tensors = {name: tensor for name, tensor in zip("hc", state, strict=True) if tensor is not None}
    if "".join(tensors) != cell.remembers:
        return [f"state has {' and '.join(tensors)}, {type(cell).__name__} needs {' and '.join(cell.remembers)}"]
    return [f"state.{n} has shape {tuple(s.shape)}: need {shape}" for n, s in tensors.items() if s.shape != shape]


def raise_if(wrong: list[str]) -> None:
    """One ValueError for all that is wrong, if anything is."""
    if wrong:
        raise ValueError("a recurrent layer cannot read this:\n  " + "\n  ".join(wrong))
