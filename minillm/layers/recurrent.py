"""Layers of recurrent cells run over a sequence: stacked, in one direction or both."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.config import nearest
from minillm.layers.cells import CELLS, Cell, State, raise_if, state_wrong


class Recurrent(nn.Module):
    """`num_layers` layers of cells, each reading the outputs of the one below; the lowest reads x.

    cell           "rnn" or "lstm"
    bidirectional  a second cell in each layer reads from the end, and its outputs stand behind the first one's
                   (Schuster & Paliwal 1997, IEEE Transactions on Signal Processing 45, 2673-2681)
    dropout        on what one layer hands to the next (Zaremba et al. 2014, arXiv:1409.2329)
    activation     of the RNN: "tanh", "relu" or "linear"
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: str = "tanh",
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell={cell!r}: did you mean {nearest(cell, CELLS)}?")
        if cell == "lstm" and activation != "tanh":
            raise ValueError(f"activation={activation!r} is for cell='rnn'; an LSTM's is tanh")
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        self.input_size, self.hidden_size, self.directions = input_size, hidden_size, 2 if bidirectional else 1
        sizes = [input_size] + [self.directions * hidden_size] * (num_layers - 1)
        options = {"activation": activation} if cell == "rnn" else {}
        self.layers = nn.ModuleList(
            nn.ModuleList(CELLS[cell](size, hidden_size, **options) for _ in range(self.directions)) for size in sizes
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        state: State | None = None,
        truncate: int | None = None,
    ) -> tuple[Float[Tensor, "B T E"], State]:
        """The top layer's outputs (E = hidden_size x directions) and the state at the end.

        `mask` (B, T): True at real tokens; padding may be at the right or the left of each row, changes no state and
        gets zeros as output, so the final state is that after a row's last real token (or its first, backwards).
        `state`: to start from, zeros unless given. `truncate`: a gradient passes at most so many steps back, because
        the state is detached at every multiple of it (Williams & Peng 1990, Neural Computation 2, 490-501).
        """
        self._check(x, mask, state, truncate)
        cells = sum(map(len, self.layers))
        starts = iter([None] * cells if state is None else [state.map(lambda s, i=i: s[i]) for i in range(cells)])
        ends = []
        for depth, layer in enumerate(self.layers):
            x = self.dropout(x) if depth else x
            sides = [
                _scan(cell, x, next(starts), mask, truncate, backwards=bool(side)) for side, cell in enumerate(layer)
            ]
            x = sides[0][0] if len(sides) == 1 else torch.cat([outputs for outputs, _ in sides], dim=-1)
            ends += [end for _, end in sides]
        h, c = zip(*ends, strict=True)
        return x, State(torch.stack(h), None if c[0] is None else torch.stack(c))

    def _check(self, x: Tensor, mask: Tensor | None, state: State | None, truncate: int | None) -> None:
        wrong = []
        if x.shape[1] < 1 or x.shape[2] != self.input_size:
            wrong.append(f"x has shape {tuple(x.shape)}: need (B, T, {self.input_size}) with T at least 1")
        if mask is not None:
            fits = mask.shape == x.shape[:2]
            wrong += padding_wrong(mask) if fits else [f"mask is {tuple(mask.shape)}, x is {tuple(x.shape)}"]
        if state is not None:
            shape = (len(self.layers) * self.directions, len(x), self.hidden_size)
            wrong += state_wrong(state, shape, self.layers[0][0])
        if truncate is not None and (truncate < 1 or self.directions == 2):
            wrong.append(f"truncate={truncate}: must be at least 1, and for one direction only")
        raise_if(wrong)


def _scan(
    cell: Cell, x: Tensor, state: State | None, mask: Tensor | None, truncate: int | None, *, backwards: bool
) -> tuple[Tensor, State]:
    """One cell over all positions of x (B, T, I): outputs (B, T, D) in the order of x, and the last state.

    All of x is projected in one product; only W_h h has to wait for its turn.
    """
    state = cell.zero_state(x) if state is None else state
    projected, recur = cell.input_proj(x), cell.hidden_proj
    before, outputs = [state.h] * x.shape[1], [state.h] * x.shape[1]  # the h that each position reads and writes
    if type(cell.hidden_proj) is nn.Linear and not torch.compiler.is_compiling():  # else: an adapter, which is called
        projected = _OneProduct.apply(projected, cell.hidden_proj.weight, before)
        recur = partial(F.linear, weight=cell.hidden_proj.weight.detach())
    steps = list(enumerate(projected.unbind(1)))
    for t, z in reversed(steps) if backwards else steps:
        if truncate and t and t % truncate == 0:
            state = state.detach()
        before[t] = state.h.detach()
        new = cell.update(z + recur(state.h), state)
        state = new if mask is None else new.where(mask[:, t, None], state)
        outputs[t] = state.h
    y = torch.stack(outputs, dim=1)
    return (y if mask is None else y.masked_fill(~mask[..., None], 0.0)), state


class _OneProduct(torch.autograd.Function):
    """Hands `projected` on; in the backward pass it makes the gradient of the recurrent weight, in one product.

    The loop multiplies with a detached weight; else autograd would add up a full-size gradient at every step, which
    costs a tenth of the time of forward and backward (LSTM, B 32, T 128, D 256). The gradient that arrives here is that
    of z for all positions, and `before` holds the h that each was multiplied with.
    """

    @staticmethod
    def forward(ctx, projected, weight, before):
        ctx.before, ctx.dtype = before, weight.dtype
        return projected.view_as(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        h = torch.stack(ctx.before, dim=1).to(grad.dtype)
        return grad, (grad.flatten(0, 1).T @ h.flatten(0, 1)).to(ctx.dtype), None


def padding_wrong(mask: Tensor) -> list[str]:
    """What is wrong with a mask (B, T) whose rows should each be one run of real tokens, padded on either side."""
    if mask.dtype != torch.bool:
        return [f"mask is {mask.dtype}: need torch.bool, True at real tokens"]
    wrong = []
    if empty := (~mask.any(-1)).nonzero().flatten().tolist():
        wrong.append(f"mask: rows {empty} have no real token: leave them out")
    begins = mask[:, 0].long() + (mask[:, 1:] > mask[:, :-1]).sum(-1)
    if holes := (begins > 1).nonzero().flatten().tolist():
        wrong.append(f"mask: rows {holes} have padding between real tokens: it belongs to their right or left")
    return wrong
