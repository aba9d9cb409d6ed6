"""Many low-rank adapters in one batch: each row of the batch has an adapter of its own, or none.

The base layer has run once over the whole batch; only the thin products differ from row to row.
Source: Chen et al. 2023 (Punica, arXiv:2310.18547), section 3; Sheng et al. 2023 (S-LoRA, arXiv:2311.03285), section 5.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.ops.lora import lora
from minillm.ops.registry import Op


@Op
def lora_gather(
    y: Float[Tensor, "B T Dout"],
    x: Float[Tensor, "B T Din"],
    a: Float[Tensor, "N R Din"],
    b: Float[Tensor, "N Dout R"],
    rows: Int[Tensor, "B"],
    scale: Float[Tensor, "N"],
) -> Float[Tensor, "B T Dout"]:
    """Add to each row i of `y` the low-rank update of adapter `rows[i]`; a row with -1 stays as it is.

    Semantics: y[i] + scale[n] * (x[i] @ a[n].T) @ b[n].T, where n = rows[i]. Adapters of a lower rank than R are padded
    with zeros, which changes neither the update nor the gradients. The update is computed in the dtype of `a` and the
    sum rounded once to the dtype of `y`. An adapter that no row uses gets gradients of zero.
    """
    _check(rows, len(a))
    update = torch.zeros(y.shape, dtype=torch.promote_types(y.dtype, a.dtype), device=y.device)
    for n in range(len(a)):
        (mine,) = (rows == n).nonzero(as_tuple=True)
        part = scale[n] * ((x[mine].to(a.dtype) @ a[n].mT) @ b[n].mT)
        update = update.index_add(0, mine, part.to(update.dtype))
    return (y + update).to(y.dtype)


@lora_gather.implementation("torch")
def _lora_gather_padded(y, x, a, b, rows, scale):
    """Copy every row's own matrices into one stack and multiply them in two batched products.

    On one CPU thread this is the fastest of the three ways for 4 and more adapters, and its time does not depend on
    how many there are: S-LoRA's baseline "bmm", whose copies `lora_rows` can save where the rows stay the same.
    """
    a, b = (F.pad(t, (0, 0, 0, 0, 1, 0)) for t in (a, scale[:, None, None] * b))  # one of zeros for rows without
    return lora_rows(y, x, a.index_select(0, rows + 1), b.index_select(0, rows + 1))


def lora_segments(
    y: Float[Tensor, "B T Dout"],
    x: Float[Tensor, "B T Din"],
    a: Float[Tensor, "N R Din"],
    b: Float[Tensor, "N Dout R"],
    rows: Int[Tensor, "B"],
    scale: Float[Tensor, "N"],
) -> Float[Tensor, "B T Dout"]:
    """`lora_gather` with the rows sorted by adapter: each one's are a segment, multiplied as one matrix.

    Punica's SGMV, told in library calls: no matrix is copied, and an adapter is read once however many rows use it. A
    GPU does all segments in one launch; here each is a call of its own, which the padded products beat on a CPU.
    """
    _check(rows, len(a))
    order = rows.argsort(stable=True)
    sizes = torch.bincount(rows + 1, minlength=len(a) + 1).tolist()  # of the segments; the first has no adapter
    segments = x[order].split(sizes)[1:]
    updates = [
        scale[n] * ((segment.flatten(0, 1).to(a.dtype) @ a[n].mT) @ b[n].mT) for n, segment in enumerate(segments)
    ]
    with_adapter = order[sizes[0] :]
    update = torch.cat(updates).view(len(with_adapter), *y.shape[1:])
    wide = torch.promote_types(y.dtype, update.dtype)
    return y.to(wide).index_add(0, with_adapter, update.to(wide)).to(y.dtype)


@Op
def lora_rows(
    y: Float[Tensor, "B T Dout"],
    x: Float[Tensor, "B T Din"],
    a: Float[Tensor, "B R Din"],
    b: Float[Tensor, "B Dout R"],
) -> Float[Tensor, "B T Dout"]:
    """Add to each row i of `y` the low-rank update of x[i] by its own a[i] and b[i], the scale multiplied into b.

    Semantics: y[i] + (x[i] @ a[i].T) @ b[i].T. What `lora_gather` does once the matrices of the rows are gathered.
    """
    return torch.stack([lora(*row, 1.0) for row in zip(y, x, a, b, strict=True)]) if len(y) else y


@lora_rows.implementation("torch")
def _lora_rows_torch(y, x, a, b):
    u = torch.bmm(x.to(a.dtype), a.mT)  # (B, T, R)
    if y.dtype == a.dtype and not torch.is_autocast_enabled(y.device.type):
        return torch.baddbmm(y, u, b.mT)
    return (y + torch.bmm(u, b.mT)).to(y.dtype)


def _check(rows: Tensor, count: int) -> None:
    if rows.numel() and not -1 <= rows.min() <= rows.max() < count:
        raise ValueError(f"rows from {rows.min()} to {rows.max()}: an adapter's number, 0..{count - 1}, or -1 for none")
