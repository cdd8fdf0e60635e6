"""Products with a frozen weight in fp8: ``y = x W^T`` and, in the backward pass, ``grad_x = grad_y W``.

Both operands are float8_e4m3fn.  x and grad_y get a scale for each token when they are there, W one for each output
channel, once.  All scales are powers of two: dividing by them is exact in 16 bits, so that a value is rounded once, and
W's scales can be moved into grad_y without an error.  The backward pass so multiplies with the very values of the
forward pass: W is quantised once, and lies there in both layouts, because the products of fp8 read both operands along
the dimension that is summed.

grad_y is e4m3 too.  e5m2 would add range below the largest value of a row, of which a scale for each token leaves
enough, and take one bit of the mantissa, which is all that decides the error here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scaling import ABOVE, EXPONENT, FORMAT, MOST, POWER

STEP = 16  # what torch's scaled product wants both sizes of a weight to be multiples of
# Rows of a product on a GPU below which it runs in 16 bits: with 1 and 17 rows cuBLAS has refused a weight of
# [4096, 14336] (torch 2.11, CUDA 13.0, H200).  The last layer has as few where only rows with labels are computed.
FEW = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight [N, K] in fp8.

    Attributes:
        values: [N, K], and ``transposed`` [K, N], the same values.
        scale: fp32 [N, 1]: a row of the weight is its values times this.
        ones: fp32 [1, K], the scales of the columns of ``transposed``.
    """

    values: Tensor
    transposed: Tensor
    scale: Tensor
    ones: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """Of a 16-bit or fp32 weight [N, K], N and K multiples of 16."""
        values, scale = quantize_rows(weight)
        return cls(values, values.t().contiguous(), scale, scale.new_ones(1, weight.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all four tensors."""
        return sum(t.nbytes for t in (self.values, self.transposed, self.scale, self.ones))


def quantize_rows(rows: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``rows`` [M, C], or ``rows * factor``, as fp8 values [M, C] and an fp32 scale for each row, [M, 1].

    The scale is the smallest power of two under which the row's largest value fits.  A value has then a relative error
    of at most 2^-4, where it is not below 2^-13 of the largest; further below an absolute one.  A row with a value that
    is not finite gets NaN for its scale.  On a GPU with Triton one kernel does it, else torch's operations: the same
    bits.

    Args:
        rows: 16-bit or fp32.
        factor: fp32 [C] of powers of two, one for each column; None for ones.
    """
    if rows.is_cuda and _kernel() is not None and rows.shape[1] <= _kernel().WIDEST:
        return _kernel().quantize_rows(rows, factor)
    if factor is not None:
        rows = rows * factor.to(rows.dtype)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).float()
    exponent = ((largest.view(torch.int32) + ABOVE) >> EXPONENT).sub_(POWER).clamp_(1, MOST - 1)
    scale = torch.where(largest.isfinite(), (exponent << EXPONENT).view(torch.float32), torch.nan)
    inverse = ((MOST - exponent) << EXPONENT).view(torch.float32)
    return (rows * inverse.to(rows.dtype)).to(FORMAT), scale


@functools.cache
def _kernel():
    """The module with the kernel; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import row_quantization

    return row_quantization


def _scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias, dtype: torch.dtype, fast: bool) -> Tensor:
    """``(a * scale_a) (b * scale_b) + bias``; a [M, C], scale_a [M, 1], b [C, N], scale_b [1, N]."""
    if not (len(a) >= FEW if a.is_cuda else _row_scales_on_cpu()):
        return _unpacked_mm(a, b, scale_a, scale_b, bias, dtype)
    try:
        return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)
    except RuntimeError as error:
        if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
    return _unpacked_mm(a, b, scale_a, scale_b, bias, dtype)


def _unpacked_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias, dtype: torch.dtype) -> Tensor:
    """The same product in 16 bits, which hold every fp8 value; scales that are powers of two round nothing."""
    out = torch.mm(a.to(dtype), b.to(dtype)).mul_(scale_a).mul_(scale_b)
    return out if bias is None else out.add_(bias)


@functools.cache
def _row_scales_on_cpu() -> bool:
    """Whether this torch takes a scale for each row on a CPU; some know one for a tensor there."""
    try:
        values, ones = torch.ones(STEP, STEP, device="cpu").to(FORMAT), torch.ones(STEP, device="cpu")
        torch._scaled_mm(values, values.t(), scale_a=ones[:, None], scale_b=ones[None], out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


class _Product(torch.autograd.Function):
    """x [M, K] with a frozen weight; nothing of x is kept."""

    @staticmethod
    def forward(ctx, x, weight: Fp8Weight, bias):
        ctx.weight = weight
        values, scale = quantize_rows(x)
        # As torchao and Transformer Engine: sums of the forward pass stay in the tensor cores' registers.
        return _scaled_mm(values, weight.values.t(), scale, weight.scale.t(), bias, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight = ctx.weight
        values, scale = quantize_rows(grad, weight.scale.flatten())
        return _scaled_mm(values, weight.transposed.t(), scale, weight.ones, None, grad.dtype, fast=False), None, None


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in fp8, differentiable in ``x`` and ``bias``.

    Args:
        x: bfloat16 [..., K].
        weight: of [N, K].
        bias: bfloat16 [N].

    Returns:
        bfloat16 [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    inside = bias is not None and not bias.requires_grad
    out = _Product.apply(rows, weight, bias if inside else None) if len(rows) else rows.new_zeros(0, len(weight.values))
    out = out.view(*x.shape[:-1], len(weight.values))
    return out if bias is None or inside else out + bias
