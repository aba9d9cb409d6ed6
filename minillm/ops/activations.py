"""The non-linearities of the MLPs."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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


@swiglu.implementation("torch")
def _swiglu_torch(gate, up):
    if torch.is_grad_enabled() and gate.dtype == up.dtype:
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only its two inputs, and makes silu(gate) again in the backward pass: a third less to remember."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_silu = grad * up
        grad_gate = torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu)
        return grad_gate, F.silu(gate).mul_(grad)
