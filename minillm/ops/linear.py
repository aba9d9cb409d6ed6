"""The linear layer as an op: for a few rows, as in generation, reading the weight is all of the time."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minillm.ops.registry import Op

ROWS = 4  # for more, a library's product is as fast as ours
SMALL = 2**16  # a weight of fewer numbers stays in the second cache, where calling our kernel costs what it saves


@Op
def linear(
    x: Float[Tensor, "*batch Din"], weight: Float[Tensor, "Dout Din"], bias: Float[Tensor, "Dout"] | None = None
) -> Float[Tensor, "*batch Dout"]:
    """Semantics: x @ weight.T + bias."""
    y = x @ weight.mT
    return y if bias is None else y + bias


linear.implementation("torch")(F.linear)
