"""Bottleneck adapters: small MLPs with a residual connection, inside the blocks of a frozen transformer.

Sources: Houlsby et al. 2019 (arXiv:1902.00751), figure 2; Pfeiffer et al. 2020 (arXiv:2005.00247), section 3, with the
placement that the library AdapterHub gives their adapters; He et al. 2021 (arXiv:2110.04366), section 3.

In a block (`minillm.layers.Block`) s is what a sublayer makes of x, and the adapter's output goes on in its place:
    houlsby   s + f(s)              after self-attention and after the MLP
    pfeiffer  s + f(norm(x + s))    after the MLP; with norm_first, where no norm follows, s + f(s)
    parallel  s + f(x)              beside the MLP
where f(h) = scaling * Up(act(Down(h))). So on a post-norm block Pfeiffer's adapter reads through the frozen norm, which
the block then applies once more. On post-norm blocks, which the papers have, all three equal AdapterHub's; with
norm_first Houlsby's does, while AdapterHub lets the other two read the stream before the norm, as x + s and x.
The papers drop out features of s before the adapter; here the block's own dropout follows, which only training shows.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.layers import Block
from minillm.ops import ACTIVATIONS
from minillm.peft.linears import adapter_dtype, device_of
from minillm.peft.names import Wrapper


class Bottleneck(Wrapper):
    """base(x, ...) + scaling * Up(act(Down(h))), where h is what the adapter reads (see above).

    `block`: the post-norm block whose norm it reads through; `beside`: it reads the base's input. Down is (M, Din) and
    Up (Dout, M), with biases, in float32 at least, also on a bfloat16 base. Dropout acts on what is added.
    """

    def __init__(
        self,
        base: nn.Module,
        sizes: tuple[int, int, int],  # Din, M, Dout
        *,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        beside: bool = False,
        block: Block | None = None,
        like: nn.Module | None = None,  # its dtype and device, where the base has no weights
    ):
        super().__init__()
        where = {"dtype": adapter_dtype(like or base), "device": device_of(like or base)}
        self.base, self.beside, self.scaling = base, beside, scaling
        self.down, self.up = nn.Linear(*sizes[:2], **where), nn.Linear(*sizes[1:], **where)
        self.activation, self.dropout = ACTIVATIONS[activation], nn.Dropout(dropout)
        self.within = (block,)  # in a tuple, since it is no part of this module

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Draw new weights; biases are 0. Only "identity", with Up = 0, leaves the base's output as it is."""
        for layer in (self.down, self.up):
            layer.bias.zero_()
            if init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
            elif init == "bert":
                layer.weight.normal_(std=0.02)
        if init == "identity":  # He et al.'s, and LoRA's
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            self.up.weight.zero_()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Float[Tensor, "*B Dout"]:
        s = self.base(x, *args, **kwargs)
        if not isinstance(s, Tensor):
            raise ValueError(
                f"a bottleneck adapter stands around a {type(self.base).__name__}, which returns a {type(s).__name__}: "
                "give as target a module that returns one tensor, such as its last linear layer"
            )
        return (s + self.dropout(self.update(self.read(x, s)))).to(s.dtype)

    def read(self, x: Tensor, s: Float[Tensor, "*B Dout"]) -> Float[Tensor, "*B Din"]:
        """What the adapter reads, of the base's input `x` and output `s`."""
        (block,) = self.within
        return x if self.beside else s if block is None else block.mlp_norm(x + s)

    def update(self, h: Float[Tensor, "*B Din"]) -> Float[Tensor, "*B Dout"]:
        """What the adapter adds: scaling * Up(act(Down(h))), in the dtype of its weights."""
        return self.scaling * self.up(self.activation(self.down(h.to(self.down.weight.dtype))))

    def extra_repr(self) -> str:
        (block,) = self.within
        reads = "input" if self.beside else "output" if block is None else "norm(input + output)"
        return f"reads={reads}, scaling={self.scaling:g}"
