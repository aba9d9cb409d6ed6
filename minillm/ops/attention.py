"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

Shapes: B batch, T query positions, S key positions, H query heads, G key/value heads (which divide H), K features.
Masks are boolean, True where a query may see a key.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.ops.registry import Op


def causal_mask(
    num_queries: int, num_keys: int, device: torch.device | str = "cpu", *, window: int = 0, prefix: int = 0
) -> Bool[Tensor, "T S"]:
    """True where query i may see key j. The queries are the newest positions: i sees all keys up to j = i + S - T.

    With a `window` it sees the newest `window` of these, its own among them: sliding-window attention (Child et al.
    2019, arXiv:1904.10509; Jiang et al. 2023, arXiv:2310.06825, section 2). The first `prefix` keys, a learned prefix,
    are seen from everywhere.
    """
    keep = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    newest = num_keys - num_queries
    keep = keep.tril(diagonal=newest)
    if window:
        near = keep.triu(diagonal=newest - window + 1)
        near[:, :prefix] = keep[:, :prefix]
        keep = near
    return keep


def attention_weights(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    *,
    mask: Bool[Tensor, "#B #H #T S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    bias: Float[Tensor, "#B #H #T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """How much each query reads from each key: softmax over S of scale * q.k + bias; each row sums to 1.

    `scale` is 1/sqrt(K) unless given. With G < H key heads, each serves H/G neighbouring query heads (GQA, Ainslie et
    al. 2023, arXiv:2305.13245). A query that may see no key at all has weights 0.
    `causal`, with a `window` and a `prefix` if given, adds `causal_mask` to the mask.
    Half-precision scores are computed in float32.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    keep = _combine(mask, causal, window, prefix, q.shape[2], k.shape[2], q.device)
    if keep is None:
        return scores.softmax(-1).to(q.dtype)
    scores = scores.masked_fill(~keep, -math.inf)
    empty = ~keep.any(-1, keepdim=True)  # softmax over nothing would be 0/0
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(q.dtype)


@Op
def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S Kv"],
    *,
    mask: Bool[Tensor, "#B #H #T S"] | None = None,
    causal: bool = False,
    window: int = 0,
    prefix: int = 0,
    bias: Float[Tensor, "#B #H #T S"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T Kv"]:
    """Each query's weighted mean of the values.

    Semantics: `attention_weights(q, k, ...) @ v`, with `dropout` zeroing that share of the weights.
    A query that may see no key at all reads 0.
    """
    weights = attention_weights(q, k, mask=mask, causal=causal, window=window, prefix=prefix, bias=bias, scale=scale)
    weights = F.dropout(weights, dropout)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@attention.implementation("torch")
def _attention_torch(q, k, v, *, mask=None, causal=False, window=0, prefix=0, bias=None, scale=None, dropout=0.0):
    """PyTorch's fused attention, which never stores the T x S weights."""
    queries, keys = q.shape[2], k.shape[2]
    window = _needed(window, causal, keys)
    causal = causal and (queries > 1 or window > 0)  # one query, the newest, sees every key
    if causal and (mask is not None or bias is not None or queries != keys or window):
        mask = _combine(mask, causal, window, prefix, queries, keys, q.device)
        causal = False  # is_causal means i sees j <= i
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
    )


def _needed(window: int, causal: bool, keys: int) -> int:
    """The window, or 0 if it holds all keys."""
    if window and not causal:
        raise ValueError(f"window={window} counts the newest keys that a query sees: it goes with causal=True")
    return 0 if window >= keys else window


def _combine(
    mask: Tensor | None, causal: bool, window: int, prefix: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    window = _needed(window, causal, keys)
    if not causal:
        return mask
    keep = causal_mask(queries, keys, device, window=window, prefix=prefix)
    return keep if mask is None else mask & keep
