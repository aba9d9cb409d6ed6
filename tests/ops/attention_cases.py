"""What every kernel of attention must compute: edge cases, and the formula in float64.

Low precision: at most twice the error of torch's own attention in the same type (as FlashAttention's tests have it).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minillm.ops import attention as attention_op

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3}  # of the error, for outputs of about 1: where torch's is 0 by luck


@dataclass
class Case:
    B: int = 1
    H: int = 1
    G: int = 1
    T: int = 1
    S: int = 1
    K: int = 16
    causal: bool = True
    padding: str = ""
    window: int = 0
    prefix: int = 0
    strided: bool = False
    scale: float | None = None
    size: float = 1.0  # of the queries: large ones make exp() overflow if the largest score is not taken off

    def rules(self) -> dict:
        return {name: getattr(self, name) for name in ("causal", "window", "prefix", "scale")}

    def keys(self) -> torch.Tensor | None:
        """(B, S), True for real keys."""
        if not self.padding:
            return None
        keys = torch.ones(self.B, self.S, dtype=torch.bool)
        third = self.S // 3 + 1
        if self.padding == "left":
            keys[:, :third] = False
        elif self.padding == "right":
            keys[:, -third:] = False
        elif self.padding == "holes":
            keys[:, ::3] = False
        elif self.padding == "tiles":  # some 64 keys in the middle
            keys[:, self.S // 4 : 3 * self.S // 4] = False
        else:
            keys[0] = False
        return keys

    def visible(self) -> torch.Tensor:
        """(B, T, S): the rule of csrc/attention.h, word for word."""
        i, j = torch.arange(self.T)[:, None], torch.arange(self.S)
        seen = torch.ones(self.T, self.S, dtype=torch.bool)
        if self.causal:
            seen &= j <= i + self.S - self.T
        if self.window:
            seen &= (j < self.prefix) | (j > i + self.S - self.T - self.window)
        keys = self.keys()
        return seen[None].repeat(self.B, 1, 1) if keys is None else seen & keys[:, None]

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k, v and a gradient of the output."""
        random = torch.Generator().manual_seed(self.T * 1000 + self.S)

        def draw(heads, rows):
            if self.strided:  # rows before heads, within a longer cache
                wide = torch.randn(self.B, rows + 3, heads, self.K + 8, generator=random).to(dtype)
                return wide[:, 2 : rows + 2, :, : self.K].transpose(1, 2)
            return torch.randn(self.B, heads, rows, self.K, generator=random).to(dtype)

        q, k, v, grad = (
            draw(h, n) for h, n in ((self.H, self.T), (self.G, self.S), (self.G, self.S), (self.H, self.T))
        )
        return [q * self.size, k, v, grad]

    def expected(self, q, k, v):
        """(o, lse) by the formula, in the precision of q."""
        mask = self.visible()[:, None]
        scale = 1 / math.sqrt(self.K) if self.scale is None else self.scale
        o = attention_op.implementations["reference"](q, k, v, mask=mask, scale=scale)
        scores = scale * q @ k.repeat_interleave(self.H // self.G, 1).mT
        return o, scores.masked_fill(~mask, -math.inf).logsumexp(-1)

    def by_torch(self, q, k, v):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.visible()[:, None], scale=self.scale, enable_gqa=self.H != self.G
        )


CASES = {
    "one": Case(),
    "one query, many keys": Case(H=8, G=1, S=100, K=64),
    "short": Case(B=2, H=4, G=2, T=5, S=5, causal=False),
    "more keys than queries": Case(H=2, G=2, T=5, S=100, K=64),
    "more queries than keys": Case(H=2, G=1, T=100, S=37, K=64),
    "two tiles": Case(H=1, T=64, S=128, K=128),
    "odd": Case(B=2, H=2, G=1, T=100, S=100, K=64),
    "not causal": Case(H=2, G=2, T=33, S=70, K=32, causal=False),
    "wide heads": Case(H=1, T=70, S=70, K=256),
    "padded features": Case(H=1, T=20, S=40, K=80),
    "padding left": Case(B=2, H=2, G=2, T=64, S=64, K=32, padding="left"),
    "padding right": Case(B=2, H=4, G=1, T=5, S=100, K=64, padding="right", causal=False),
    "holes": Case(B=2, H=2, G=1, T=64, S=100, K=32, padding="holes"),
    "a tile of padding": Case(H=1, T=70, S=200, K=32, padding="tiles"),
    "nothing to see": Case(B=2, H=2, G=1, T=5, S=37, K=32, padding="all of a row"),
    "window": Case(H=1, T=100, S=100, K=32, window=9),
    "window and prefix": Case(H=2, G=1, T=100, S=110, K=32, window=20, prefix=10),
    "window without causal": Case(H=1, T=64, S=70, K=32, window=5, prefix=2, causal=False),
    "everything": Case(B=2, H=4, G=2, T=64, S=150, K=64, window=40, prefix=3, padding="holes", strided=True, scale=0.3),
    "strided": Case(B=2, H=4, G=2, T=20, S=40, K=64, strided=True),
    "large scores": Case(H=1, T=64, S=100, K=64, size=40.0),
}
ODD_SIZES = {"40 features": Case(H=2, G=1, T=20, S=50, K=40), "7 features": Case(T=5, S=33, K=7, strided=True)}


def check_forward(case: Case, q, k, v, o, lse) -> None:
    exact_o, exact_lse = case.expected(*(x.double() for x in (q, k, v)))
    nothing = ~case.visible().any(-1)[:, None].expand(lse.shape)
    assert (o[nothing] == 0).all() and (lse[nothing] == -math.inf).all()
    some = ~nothing
    error = (o.double() - exact_o)[some].abs().max()
    allowed = 2 * (case.by_torch(q, k, v).double() - exact_o)[some].abs().max() + FLOOR[q.dtype]
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    torch.testing.assert_close(lse[some].double(), exact_lse[some], rtol=1e-5, atol=1e-5)


def check_backward(case: Case, q, k, v, grad, grads) -> None:
    def by_autograd(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        seen = case.visible().any(-1)[:, None, :, None]  # torch's backward of a row that sees nothing is NaN
        return torch.autograd.grad(function(*inputs), inputs, (grad * seen).to(dtype))

    exact = by_autograd(lambda *x: case.expected(*x)[0], torch.float64)
    theirs = by_autograd(case.by_torch, q.dtype)
    for ours, wanted, their in zip(grads, exact, theirs, strict=True):
        error = (ours.double() - wanted).abs().max()
        floor = FLOOR[q.dtype] * (1 + wanted.abs().max())
        allowed = 2 * (their.double() - wanted).abs().nan_to_num(0).max() + floor
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
