"""Where the trained difference of the weak columns starts."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = ("residual", "least_squares", "zero")


def residual(original: Tensor, base_columns: Tensor, index: Tensor) -> Tensor:
    """``(W - Q)[:, index]`` in fp32 (fp64) [out, k]: with it the layer has those columns as they were."""
    return original.index_select(1, index).to(base_columns.dtype) - base_columns


def least_squares(original: Tensor, base: Tensor, cross: Tensor, index: Tensor, damping: float) -> Tensor:
    """The difference that leaves the least squared error of the layer's output on the calibration samples.

    ``(W - Q) H[:, index] (H[index, index] + λ)⁻¹`` with H = XᵀX: original and base [out, in], cross = H[:, index]
    [in, k]; λ is ``damping`` times the mean of the diagonal of H[index, index].  Computed in fp32 (fp64).
    """
    kind = torch.promote_types(cross.dtype, torch.float32)
    error = (original.to(kind) - base.to(kind)) @ cross.to(kind)
    inner = cross.index_select(0, index).to(torch.float64)
    inner = (inner + inner.t()) / 2
    inner.diagonal().add_(damping * inner.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cholesky_solve(error.to(torch.float64).t(), torch.linalg.cholesky(inner)).t().to(kind).contiguous()
