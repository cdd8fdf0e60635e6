"""Scale and offset in their four user-facing shapes, seen as one: [B or 1, Hq, D or 1] (docs/ops.md, "Tensors")."""

from __future__ import annotations

from torch import Tensor


def full_view(factor: Tensor, heads: int, head_dim: int) -> Tensor:
    """A view [B or 1, Hq, D or 1] of a scale or offset of any legal shape. `[Hq, D]` wins over `[B, Hq]`."""
    if factor.dim() == 1:
        return factor[None, :, None]
    if factor.dim() == 3:
        return factor
    return factor[None] if tuple(factor.shape) == (heads, head_dim) else factor[:, :, None]


def reduce_to(per_row: Tensor, like: Tensor) -> Tensor:
    """Sums a gradient [B, Hq, D] (one entry a batch row or packed sequence) to the shape of the factor `like`."""
    view = full_view(like, per_row.shape[1], per_row.shape[2])
    if view.shape[2] == 1:
        per_row = per_row.sum(2, keepdim=True)
    if view.shape[0] == 1:
        per_row = per_row.sum(0, keepdim=True)
    return per_row.reshape(like.shape)


def row(factor: Tensor | None, batch: int, heads: int, head_dim: int) -> Tensor | None:
    """The factor of one batch row or packed sequence, as [Hq, D or 1]."""
    if factor is None:
        return None
    view = full_view(factor, heads, head_dim)
    return view[batch if view.shape[0] > 1 else 0]
