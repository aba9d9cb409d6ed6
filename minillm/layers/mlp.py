"""The position-wise MLP of a transformer block, plain and gated."""

from jaxtyping import Float
from torch import Tensor, nn

from minillm import ops


class MLP(nn.Module):
    """down(act(up(x))): Vaswani et al. 2017 (arXiv:1706.03762), section 3.3, with any activation."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ops.ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): the gated linear unit of Shazeer 2020 (arXiv:2002.05202); SwiGLU with silu."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = ops.swiglu(gate, up) if self.activation == "silu" else ops.ACTIVATIONS[self.activation](gate) * up
        return self.down_proj(gated)


MLPS = {"plain": MLP, "gated": GatedMLP}
