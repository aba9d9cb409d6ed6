"""The linear layer as an op: for a few rows, as in generation, reading the weight is all of the time."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minillm.ops.registry import Op

ROWS = 4  # for more, a library's product is as fast as ours
# A weight of fewer numbers: a processor keeps it in its second cache, where calling our kernel costs what it saves; a
# GPU reads it in a few microseconds, less than a call from Python takes.
SMALL = {"cpu": 2**16, "cuda": 2**22}


@Op
def linear(
    x: Float[Tensor, "*batch Din"], weight: Float[Tensor, "Dout Din"], bias: Float[Tensor, "Dout"] | None = None
) -> Float[Tensor, "*batch Dout"]:
    """Semantics: x @ weight.T + bias."""
    y = x @ weight.mT
    return y if bias is None else y + bias


linear.implementation("torch")(F.linear)
