"""What the backward needs before and after its two matrix kernels: row statistics, scaled V, and sums over tiles.

_statistics  one pass over grad_out and out: lse in base 2, delta = sum_d g (out - offset) - grad_lse, and per-tile sums
             of g, which are grad_offset once added up. A sink's gradient, -sum exp(sink - lse) delta, comes of the same
             rows. With a gate f also what stands for grad_out from there on, f g, and the gate's gradient
_scale_v     scale * V of every query head, where there is a scale: the matrix kernel wants it as a tile that TMA brings
_sum_tiles   adds the per-tile sums of grad_scale and grad_offset, always in the same order
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .host import Geometry, Rows, factor_arguments, gate_arguments, padded_head_dim, per_sequence, strides, uses_tma
from .terms import load_gate, opened, slope
from .tiling import LOG2E, aligned_column, first_tile, load_factor, locate

TOKENS = 64  # of a tile of _statistics and of _scale_v
_SLACK = 128  # elements that the last block of a row may reach beyond it
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["num_seqs", "len_q", "columns", "tiles"])
def _statistics(
    grad_ptr,
    grad_b,
    grad_s,
    grad_h,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    statistics_ptr,
    sums_ptr,
    cu_q_ptr,
    offset,
    sink_ptr,
    sink_sums_ptr,
    gate,
    gated_ptr,
    grad_gate_ptr,
    num_seqs,
    len_q,
    columns,
    tiles,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GATE: tl.constexpr,
):
    all_q = len_q
    head, batch, seq, tile, start, len_q, _, _ = locate(
        tl.program_id(0), tiles, heads, num_seqs, cu_q_ptr, cu_q_ptr, len_q, len_q, BLOCK_M
    )
    first = tile * BLOCK_M
    if first >= len_q:
        return
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = rows < len_q
    valid = inside[:, None] & (d[None, :] < HEAD_DIM)
    tokens = (start + rows).to(tl.int64)
    g = tl.load(
        grad_ptr + batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h + tokens[:, None] * grad_s + d[None, :],
        mask=valid,
        other=0.0,
    ).to(tl.float32)
    o = tl.load(
        out_ptr + ((batch.to(tl.int64) * all_q + tokens) * heads + head)[:, None] * HEAD_DIM + d[None, :],
        mask=valid,
        other=0.0,
    ).to(tl.float32)
    if offset is not None:
        o -= load_factor(offset, seq, head, HEAD_DIM, BLOCK_D)
    row = (batch * heads + head).to(tl.int64)
    lse = tl.load(lse_ptr + row * all_q + tokens, mask=inside, other=0.0)
    delta = tl.sum(g * o, 1)
    if grad_lse_ptr is not None:  # of a row without keys it is ignored: nothing moves its -inf
        delta -= tl.where(
            lse == float("-inf"), 0.0, tl.load(grad_lse_ptr + row * all_q + tokens, mask=inside, other=0.0)
        )
    at = row * columns + aligned_column(start, seq, cu_q_ptr is not None) + rows
    tl.store(statistics_ptr + at, lse * _LOG2E, mask=inside)
    tl.store(statistics_ptr + tl.num_programs(0).to(tl.int64) // tiles * columns + at, delta, mask=inside)
    number = batch * tiles + (tl.program_id(0) % tiles)
    if sink_sums_ptr is not None:
        own = tl.load(sink_ptr + head).to(tl.float32)
        share = tl.where(inside & (lse != float("-inf")), tl.exp2((own - lse) * _LOG2E) * delta, 0.0)
        tl.store(sink_sums_ptr + number.to(tl.int64) * heads + head, -tl.sum(share, 0))
    if gate is not None:
        value = load_gate(gate, batch, tokens, head, inside, HEAD_DIM, BLOCK_D)
        place = (batch.to(tl.int64) * all_q + tokens) * heads + head
        tl.store(
            gated_ptr + place[:, None] * HEAD_DIM + d[None, :],
            (g * opened(value, GATE)).to(gated_ptr.dtype.element_ty),
            mask=valid,
        )
        if grad_gate_ptr is not None:
            if len(gate) == 4:
                into = tl.sum(g * o, 1)[:, None] * slope(value, GATE)
                tl.store(grad_gate_ptr + place[:, None], into.to(grad_gate_ptr.dtype.element_ty), mask=inside[:, None])
            else:
                tl.store(
                    grad_gate_ptr + place[:, None] * HEAD_DIM + d[None, :],
                    (g * o * slope(value, GATE)).to(grad_gate_ptr.dtype.element_ty),
                    mask=valid,
                )
    if sums_ptr is not None:
        tl.store(sums_ptr + (number.to(tl.int64) * heads + head) * HEAD_DIM + d, tl.sum(g, 0), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["num_seqs", "len_k", "tiles"])
def _scale_v(
    v_ptr,
    v_b,
    v_s,
    v_h,
    out_ptr,
    cu_k_ptr,
    scale,
    num_seqs,
    len_k,
    tiles,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    all_k = len_k
    head, batch, seq, tile, start, len_k, _, _ = locate(
        tl.program_id(0), tiles, heads, num_seqs, cu_k_ptr, cu_k_ptr, len_k, len_k, BLOCK_N
    )
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = (keys < len_k)[:, None] & (d[None, :] < HEAD_DIM)
    tokens = (start + keys).to(tl.int64)
    v = tl.load(
        v_ptr + batch.to(tl.int64) * v_b + (head // GROUP).to(tl.int64) * v_h + tokens[:, None] * v_s + d[None, :],
        mask=valid,
        other=0.0,
    )
    v = v * load_factor(scale, seq, head, HEAD_DIM, BLOCK_D)
    tl.store(
        out_ptr + ((batch.to(tl.int64) * all_k + tokens) * heads + head)[:, None] * HEAD_DIM + d[None, :],
        v.to(out_ptr.dtype.element_ty),
        mask=valid,
    )


@triton.jit(do_not_specialize=["tiles", "total"])
def _sum_tiles(
    sums_ptr,
    result_ptr,
    cu_ptr,
    tiles,
    total,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    STEP: tl.constexpr,
):
    """[tiles, heads, HEAD_DIM] summed in ascending order: over all tiles, or over those of each sequence."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    begin = 0
    end = total
    if PER_SEQUENCE:
        if cu_ptr is not None:
            begin = first_tile(seq, cu_ptr, BLOCK)
            end = first_tile(seq + 1, cu_ptr, BLOCK)
        else:
            begin = seq * tiles
            end = begin + tiles
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([STEP, BLOCK_D], tl.float32)
    for i in tl.range(begin, end, STEP):
        number = i + tl.arange(0, STEP)
        acc += tl.load(
            sums_ptr + ((number.to(tl.int64) * heads + head) * HEAD_DIM)[:, None] + d[None, :],
            mask=(number < end)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
    tl.store(result_ptr + (seq * heads + head).to(tl.int64) * HEAD_DIM + d, tl.sum(acc, 0), mask=d < HEAD_DIM)


class Statistics:
    """lse in base 2 and delta, [2, rows of lse, columns], each row padded to the 16 bytes that descriptors want. Where
    grad_offset is wanted, `sums`: grad_out summed over each tile of TOKENS tokens. With a gate `gated`: grad_out times
    what it opens. `grad_sink` and `grad_gate` where wanted, else None."""

    def __init__(
        self, grad_out, out, lse, grad_lse, offset, sink, gate, gate_function: str, geometry: Geometry, need: dict
    ):
        self.rows = geometry.batch * geometry.heads
        self.columns = (
            triton.cdiv(geometry.len_q + 4 * geometry.num_seqs + _SLACK, 16) * 16
        )  # aligned_column, last block
        self.tensor = lse.new_empty(2, self.rows, self.columns)
        tiles = geometry.tiles(geometry.len_q, TOKENS)
        # Packed: a sequence may own a tile too many, whose sum stays zero.
        self.sums = lse.new_zeros(tiles * geometry.batch, geometry.heads, geometry.head_dim) if need["offset"] else None
        per_sink = lse.new_zeros(tiles * geometry.batch, geometry.heads) if need["sink"] else None
        self.gated = None if gate is None else out.new_empty(out.shape)
        self.grad_gate = gate.new_empty(gate.shape) if need["gate"] else None
        _statistics[(geometry.programs(geometry.len_q, TOKENS, geometry.heads),)](
            grad_out,
            *strides(grad_out),
            out.contiguous(),
            lse.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(),
            self.tensor,
            self.sums,
            geometry.cu_q,
            factor_arguments(offset, geometry),
            sink,
            per_sink,
            gate_arguments(gate),
            self.gated,
            self.grad_gate,
            geometry.num_seqs,
            geometry.len_q,
            self.columns,
            tiles,
            geometry.heads,
            HEAD_DIM=geometry.head_dim,
            BLOCK_D=padded_head_dim(geometry.head_dim),
            BLOCK_M=TOKENS,
            GATE=gate_function,
            num_warps=4,
        )
        self.grad_sink = None if per_sink is None else per_sink.sum(0).to(sink.dtype)

    def source(self, block: int):
        """What tiling.load_statistics reads blocks of `block` rows from."""
        whole, row = self.rows * self.columns, self.columns
        if not uses_tma(self.tensor):
            return self.tensor, whole, row
        return TensorDescriptor(self.tensor, [2, self.rows, self.columns], [whole, row, 1], [1, 1, block])


def scaled_v(v: torch.Tensor, scale: torch.Tensor, geometry: Geometry) -> Rows:
    """scale * v of every query head, [B, Sk, Hq, D] or packed [Tk, Hq, D]."""
    scaled = torch.empty((*v.shape[:-2], geometry.heads, geometry.head_dim), dtype=v.dtype, device=v.device)
    _scale_v[(geometry.programs(geometry.len_k, TOKENS, geometry.heads),)](
        v,
        *strides(v),
        scaled,
        geometry.cu_k,
        factor_arguments(scale, geometry),
        geometry.num_seqs,
        geometry.len_k,
        geometry.tiles(geometry.len_k, TOKENS),
        geometry.heads,
        GROUP=geometry.group,
        HEAD_DIM=geometry.head_dim,
        BLOCK_D=padded_head_dim(geometry.head_dim),
        BLOCK_N=TOKENS,
        num_warps=4,
    )
    return Rows(scaled)


def sum_tiles(
    sums: torch.Tensor, like: torch.Tensor, geometry: Geometry, cu: torch.Tensor | None, block: int
) -> torch.Tensor:
    """Per-tile sums [tiles, Hq, D] to the gradient of a scale or offset `like`, in its own shape."""
    each = per_sequence(like, geometry)
    result = sums.new_empty(geometry.num_seqs if each else 1, geometry.heads, geometry.head_dim)
    _sum_tiles[(geometry.heads, result.shape[0])](
        sums,
        result,
        cu,
        sums.shape[0] // geometry.batch,
        sums.shape[0],
        geometry.heads,
        HEAD_DIM=geometry.head_dim,
        BLOCK_D=padded_head_dim(geometry.head_dim),
        BLOCK=block,
        PER_SEQUENCE=each,
        STEP=16,
        num_warps=4,
    )
    return geometry.reduce_factor(result, like)
