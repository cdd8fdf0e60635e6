"""Rows to fp8 in one pass, a Triton kernel; the same bits as `fp8_product.quantize_rows` in torch's operations.

A program owns a row and holds it in registers: it is read once and a quarter or half of it is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.backends.triton.host import on_device
from .scaling import ABOVE, EXPONENT, FORMAT, MOST, POWER

WIDEST = 1 << 15  # columns: what 16 warps hold without spilling
_ABOVE, _EXPONENT, _MOST, _POWER = (tl.constexpr(value) for value in (ABOVE, EXPONENT, MOST, POWER))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _quantize(rows_ptr, factor_ptr, values_ptr, scale_ptr, columns, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(rows_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if FACTOR:
        x *= tl.load(factor_ptr + column, mask=inside, other=0.0)
    # As integers the bits are in the order of the values, with infinity and NaN on top.
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0)
    exponent = tl.minimum(tl.maximum(((largest + _ABOVE) >> _EXPONENT) - _POWER, 1), _MOST - 1)
    inverse = ((0 - exponent + _MOST) << _EXPONENT).to(tl.float32, bitcast=True)
    scale = (exponent << _EXPONENT).to(tl.float32, bitcast=True)
    tl.store(values_ptr + row * columns + column, (x * inverse).to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, tl.where(largest >= _INFINITY, float("nan"), scale))


def quantize_rows(rows: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `fp8_product.quantize_rows`, for at most `WIDEST` columns."""
    rows = rows.contiguous()
    count, columns = rows.shape
    values, scale = rows.new_empty(count, columns, dtype=FORMAT), rows.new_empty(count, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    with on_device(rows):
        _quantize[count,](
            rows, rows if factor is None else factor, values, scale, columns, factor is not None, block,
            num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return values, scale
