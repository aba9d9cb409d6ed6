"""The non-linearities of the MLPs."""

import functools

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minillm.ops.registry import Op

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,  # x * Phi(x), exact; Hendrycks & Gimpel 2016, arXiv:1606.08415
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),  # GPT-2's approximation of it
    "silu": F.silu,  # x * sigmoid(x)
}


@Op
def swiglu(gate: Float[Tensor, "*B F"], up: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """silu(gate) * up, the gated activation of Llama's MLP (Shazeer 2020, arXiv:2002.05202, equation 6)."""
    return F.silu(gate) * up
