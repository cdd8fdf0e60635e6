"""Backward attention without atomics, so bitwise repeatable: every gradient element is written by the one program that owns it.

    _prepare   one pass over grad_out and out: delta = sum_d g (out - offset) - grad_lse, and per-tile sums of g (grad_offset)
    _scale_v   scale * V of every query head, where there is a scale: _dkdv needs it as a tile that TMA brings
    _dkdv      owns a tile of keys of one key/value head, walks the query blocks of all query heads of its group
    _dq        owns a tile of queries of one head, walks the key blocks
    _sum_tiles adds the per-tile sums of grad_scale and grad_offset, always in the same order

Seven matrix products instead of the five of a kernel that adds grad_q atomically; no fp32 copy of grad_q in exchange.

The gradient of the scale costs nothing extra: grad_scale_c = sum_k V_kc (P^T g)_kc, and P^T g is what _dkdv accumulates
anyway before it multiplies with the scale. So it is exact where the scale is 0.
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import choose
from .host import Geometry, Rows, factor_arguments, on_device, padded_head_dim, per_sequence, precision, uses_tma
from .rotary import rotate_in_place
from .tiling import LOG2E, aligned_column, first_tile, key_blocks, load_factor, load_rows, load_statistics, locate, product, query_blocks, seen

_LOG2E = tl.constexpr(LOG2E)
_ROWS = 64  # tokens of a tile of _prepare and _scale_v
_SLACK = 128  # rows that the last tile of a row may reach beyond it


@triton.jit(do_not_specialize=["num_seqs", "len_q", "columns", "tiles", "offset_b"])
def _prepare(grad_ptr, grad_b, grad_s, grad_h, out_ptr, lse_ptr, grad_lse_ptr, statistics_ptr, sums_ptr, cu_q_ptr, offset_ptr,
             offset_b, offset_h, offset_d, num_seqs, len_q, columns, tiles, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Writes lse in base 2 and delta into `statistics` [2, rows of lse, columns], and the sum of grad_out over the tile."""
    all_q = len_q
    head, batch, seq, tile, start, len_q, _, _ = locate(tl.program_id(0), tiles, heads, num_seqs, cu_q_ptr, cu_q_ptr, len_q,
                                                        len_q, BLOCK_M, PACKED)
    first = tile * BLOCK_M
    if first >= len_q:
        return
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = rows < len_q
    valid = inside[:, None] & (d[None, :] < HEAD_DIM)
    tokens = (start + rows).to(tl.int64)
    g = tl.load(grad_ptr + batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h + tokens[:, None] * grad_s + d[None, :],
                mask=valid, other=0.0).to(tl.float32)
    o = tl.load(out_ptr + ((batch.to(tl.int64) * all_q + tokens) * heads + head)[:, None] * HEAD_DIM + d[None, :], mask=valid,
                other=0.0).to(tl.float32)
    if offset_ptr is not None:
        o -= load_factor(offset_ptr, offset_b, offset_h, offset_d, seq, head, HEAD_DIM, BLOCK_D)[None, :]
    row = (batch * heads + head).to(tl.int64)
    lse = tl.load(lse_ptr + row * all_q + tokens, mask=inside, other=0.0)
    delta = tl.sum(g * o, 1)
    if grad_lse_ptr is not None:  # of a row without keys it is ignored: nothing moves its -inf
        delta -= tl.where(lse == float("-inf"), 0.0, tl.load(grad_lse_ptr + row * all_q + tokens, mask=inside, other=0.0))
    at = row * columns + aligned_column(start, seq, PACKED) + rows
    tl.store(statistics_ptr + at, lse * _LOG2E, mask=inside)
    tl.store(statistics_ptr + tl.num_programs(0).to(tl.int64) // tiles * columns + at, delta, mask=inside)
    if sums_ptr is not None:
        number = batch * tiles + (tl.program_id(0) % tiles)
        tl.store(sums_ptr + (number.to(tl.int64) * heads + head) * HEAD_DIM + d, tl.sum(g, 0), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["num_seqs", "len_k", "tiles", "scale_b"])
def _scale_v(v_ptr, v_b, v_s, v_h, out_ptr, cu_k_ptr, scale_ptr, scale_b, scale_h, scale_d, num_seqs, len_k, tiles, heads,
             GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    all_k = len_k
    head, batch, seq, tile, start, len_k, _, _ = locate(tl.program_id(0), tiles, heads, num_seqs, cu_k_ptr, cu_k_ptr, len_k,
                                                        len_k, BLOCK_N, PACKED)
    first = tile * BLOCK_N
    if first >= len_k:
        return
    keys = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = (keys < len_k)[:, None] & (d[None, :] < HEAD_DIM)
    tokens = (start + keys).to(tl.int64)
    v = tl.load(v_ptr + batch.to(tl.int64) * v_b + (head // GROUP).to(tl.int64) * v_h + tokens[:, None] * v_s + d[None, :],
                mask=valid, other=0.0)
    v = v * load_factor(scale_ptr, scale_b, scale_h, scale_d, seq, head, HEAD_DIM, BLOCK_D)[None, :]
    tl.store(out_ptr + ((batch.to(tl.int64) * all_k + tokens) * heads + head)[:, None] * HEAD_DIM + d[None, :],
             v.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _query_loop(dk, dv, k, v, q_source, g_source, statistics_source, batch, start_q, row, column, head, keys, begin, end, split, skip, len_q,
                len_k, left, right, qk_scale, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LEFT: tl.constexpr,
                HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, NEED_DK: tl.constexpr,
                PRECISION: tl.constexpr, TMA: tl.constexpr):
    """Adds dS^T Q to dk and P^T g to dv over the query blocks begin..end; those from `split` on lie `skip` further."""
    for i in tl.range(begin, end):
        first = i * BLOCK_M
        if MASKED:
            first += tl.where(i >= split, skip, 0) * BLOCK_M
        q = load_rows(q_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, MASKED)
        g = load_rows(g_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, MASKED)
        if MASKED:
            rows = first + tl.arange(0, BLOCK_M)
            if PACKED and TMA:  # rows of the next sequence may hold NaN, and 0 * NaN would reach us
                q = tl.where(rows[:, None] < len_q, q, 0.0)
                g = tl.where(rows[:, None] < len_q, g, 0.0)
        s = product(k, q.T, None, PRECISION)
        lse = load_statistics(statistics_source, 0, row, column + first, BLOCK_M, TMA)
        p = tl.exp2(s * qk_scale - lse[None, :])
        if MASKED:
            allowed = seen(rows[None, :], keys[:, None], len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(allowed, p, 0.0)
        p = p.to(g.dtype)  # kept rounded: at head_dim 128 the accumulators leave no registers for both forms
        dv = product(p, g, dv, PRECISION)
        if NEED_DK:
            dp = product(v, g.T, None, PRECISION)
            delta = load_statistics(statistics_source, 1, row, column + first, BLOCK_M, TMA)
            ds = p.to(tl.float32) * (dp - delta[None, :])
            if MASKED:
                ds = tl.where(allowed, ds, 0.0)
            dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_seqs", "len_q", "len_k", "tiles", "left", "right", "scale_b"])
def _dkdv(q_source, k_source, v_source, scaled_v_source, g_source, statistics_source, dk_ptr, dv_ptr, part_ptr, sums_ptr, cu_q_ptr, cu_k_ptr,
          scale_ptr, scale_b, scale_h, scale_d, sigma, qk_scale, num_seqs, len_q, len_k, tiles, kv_heads, left, right,
          GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, NEED_DK: tl.constexpr,
          PRECISION: tl.constexpr, TMA: tl.constexpr):
    all_k = len_k
    kv_head, batch, seq, tile, start_k, len_k, start_q, len_q = locate(
        tl.program_id(0), tiles, kv_heads, num_seqs, cu_k_ptr, cu_q_ptr, len_k, len_q, BLOCK_N, PACKED)
    first = tile * BLOCK_N  # causal: the first keys are seen most often, so the longest programs come first
    if first >= len_k:
        return
    keys = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = load_rows(k_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)
    if scale_ptr is None:
        v = load_rows(v_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)
    column = aligned_column(start_q, seq, PACKED)
    begin, full_begin, full_end, end = query_blocks(first, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    at = ((batch.to(tl.int64) * all_k + start_k + keys) * kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
    valid = (keys < len_k)[:, None] & (d[None, :] < HEAD_DIM)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        row = batch * kv_heads * GROUP + head
        if scale_ptr is not None:
            v = load_rows(scaled_v_source, batch, head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dk, dv = _query_loop(dk, dv, k, v, q_source, g_source, statistics_source, batch, start_q, row, column, head, keys, full_begin, full_end,
                             0, 0, len_q, len_k, left, right, qk_scale, BLOCK_M, HEAD_DIM, BLOCK_D, HAS_LEFT, HAS_RIGHT, False, PACKED,
                             NEED_DK, PRECISION, TMA)
        dk, dv = _query_loop(dk, dv, k, v, q_source, g_source, statistics_source, batch, start_q, row, column, head, keys, begin,
                             end - (full_end - full_begin), full_begin, full_end - full_begin, len_q, len_k, left, right,
                             qk_scale, BLOCK_M, HEAD_DIM, BLOCK_D, HAS_LEFT, HAS_RIGHT, True, PACKED, NEED_DK, PRECISION, TMA)
        if scale_ptr is not None:
            if sums_ptr is not None:
                unscaled = load_rows(v_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True).to(tl.float32)
                product = tl.where(valid, unscaled * dv, 0.0)
                number = batch * tiles + (tl.program_id(0) % tiles)
                tl.store(sums_ptr + (number.to(tl.int64) * kv_heads * GROUP + head) * HEAD_DIM + d, tl.sum(product, 0),
                         mask=d < HEAD_DIM)
            dv *= load_factor(scale_ptr, scale_b, scale_h, scale_d, seq, head, HEAD_DIM, BLOCK_D)[None, :]
            if GROUP > 1 and dv_ptr is not None:  # every head has its own scale: the sum of the group waits in memory, only this program touches it
                if member > 0:
                    tl.debug_barrier()
                    dv += tl.load(part_ptr + at, mask=valid, other=0.0)
                if member < GROUP - 1:
                    tl.store(part_ptr + at, dv, mask=valid)
    if dv_ptr is not None:
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=valid)
    if NEED_DK:
        tl.store(dk_ptr + at, (dk * sigma).to(dk_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _key_loop(dq, q, g, lse, delta, k_source, v_source, batch, start_k, kv_head, rows, begin, end, split, skip, len_q, len_k, left,
              right, qk_scale, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
              MASKED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    """Adds dS K to dq over the key blocks begin..end; those from `split` on lie `skip` blocks further."""
    for i in tl.range(begin, end):
        first = i * BLOCK_N
        if MASKED:
            first += tl.where(i >= split, skip, 0) * BLOCK_N
        k = load_rows(k_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        v = load_rows(v_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        keys = first + tl.arange(0, BLOCK_N)
        if MASKED and PACKED and TMA:  # rows of the next sequence may hold NaN, and 0 * NaN would reach us
            k = tl.where(keys[:, None] < len_k, k, 0.0)
        s = product(q, k.T, None, PRECISION)
        dp = product(g, v.T, None, PRECISION)
        ds = tl.exp2(s * qk_scale - lse[:, None]) * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(seen(rows[:, None], keys[None, :], len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT), ds, 0.0)
        dq = product(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_seqs", "len_q", "len_k", "columns", "tiles", "left", "right", "scale_b"])
def _dq(q_source, k_source, v_source, g_source, statistics_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, scale_ptr, scale_b, scale_h, scale_d,
        sigma, qk_scale, num_seqs, len_q, len_k, columns, tiles, heads, left, right, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
        PACKED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    all_q = len_q
    head, batch, seq, tile, start_q, len_q, start_k, len_k = locate(
        tl.program_id(0), tiles, heads, num_seqs, cu_q_ptr, cu_k_ptr, len_q, len_k, BLOCK_M, PACKED)
    first = (tl.cdiv(len_q, BLOCK_M) - 1 - tile) * BLOCK_M  # causal: the longest rows first
    if first < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < len_q
    d = tl.arange(0, BLOCK_D)
    q = load_rows(q_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, True)
    g = load_rows(g_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, True)
    if scale_ptr is not None:
        g = (g * load_factor(scale_ptr, scale_b, scale_h, scale_d, seq, head, HEAD_DIM, BLOCK_D)[None, :]).to(g.dtype)
    at = (batch * heads + head).to(tl.int64) * columns + aligned_column(start_q, seq, PACKED) + rows
    lse = tl.load(statistics_ptr + at, mask=inside, other=0.0)
    delta = tl.load(statistics_ptr + tl.num_programs(0).to(tl.int64) // tiles * columns + at, mask=inside, other=0.0)
    begin, full_begin, full_end, end = key_blocks(first, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _key_loop(dq, q, g, lse, delta, k_source, v_source, batch, start_k, head // GROUP, rows, full_begin, full_end, 0, 0, len_q,
                   len_k, left, right, qk_scale, BLOCK_N, HEAD_DIM, BLOCK_D, HAS_LEFT, HAS_RIGHT, False, PACKED, PRECISION, TMA)
    dq = _key_loop(dq, q, g, lse, delta, k_source, v_source, batch, start_k, head // GROUP, rows, begin,
                   end - (full_end - full_begin), full_begin, full_end - full_begin, len_q, len_k, left, right, qk_scale,
                   BLOCK_N, HEAD_DIM, BLOCK_D, HAS_LEFT, HAS_RIGHT, True, PACKED, PRECISION, TMA)
    tokens = batch.to(tl.int64) * all_q + start_q + rows
    tl.store(dq_ptr + (tokens * heads + head)[:, None] * HEAD_DIM + d[None, :], (dq * sigma).to(dq_ptr.dtype.element_ty),
             mask=inside[:, None] & (d[None, :] < HEAD_DIM))


@triton.jit(do_not_specialize=["tiles", "total"])
def _sum_tiles(sums_ptr, result_ptr, cu_ptr, tiles, total, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK: tl.constexpr, PER_SEQUENCE: tl.constexpr, PACKED: tl.constexpr, STEP: tl.constexpr):
    """[tiles, heads, HEAD_DIM] summed in ascending order: over all tiles, or over those of each sequence."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    begin = 0
    end = total
    if PER_SEQUENCE:
        if PACKED:
            begin = first_tile(seq, cu_ptr, BLOCK)
            end = first_tile(seq + 1, cu_ptr, BLOCK)
        else:
            begin = seq * tiles
            end = begin + tiles
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([STEP, BLOCK_D], tl.float32)
    for i in tl.range(begin, end, STEP):
        number = i + tl.arange(0, STEP)
        acc += tl.load(sums_ptr + ((number.to(tl.int64) * heads + head) * HEAD_DIM)[:, None] + d[None, :],
                       mask=(number < end)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    tl.store(result_ptr + (seq * heads + head).to(tl.int64) * HEAD_DIM + d, tl.sum(acc, 0), mask=d < HEAD_DIM)


class _Prepared:
    """What _prepare leaves: `statistics` [2, rows of lse, columns] with lse in base 2 and delta, each row padded to the 16
    bytes that descriptors want, and where grad_offset is wanted the sums of grad_out over each tile of _ROWS tokens."""

    def __init__(self, grad_out, out, lse, grad_lse, offset, need_offset, geometry):
        self.columns = triton.cdiv(geometry.len_q + 4 * geometry.num_seqs + _SLACK, 16) * 16  # aligned_column, last tile
        self.rows = geometry.batch * geometry.heads
        self.statistics = lse.new_empty(2, self.rows, self.columns)
        tiles = geometry.tiles(geometry.len_q, _ROWS)
        # Packed: a sequence may own a tile too many, whose sum stays zero.
        self.sums = lse.new_zeros(tiles * geometry.batch, geometry.heads, geometry.head_dim) if need_offset else None
        grad_rows = grad_out if grad_out.dim() == 4 else grad_out[None]
        _prepare[(geometry.programs(geometry.len_q, _ROWS, geometry.heads),)](
            grad_out, *grad_rows.stride()[:3], out.contiguous(), lse.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(), self.statistics, self.sums, geometry.cu_q,
            *factor_arguments(offset, geometry), geometry.num_seqs, geometry.len_q, self.columns, tiles, geometry.heads,
            HEAD_DIM=geometry.head_dim, BLOCK_D=padded_head_dim(geometry.head_dim), BLOCK_M=_ROWS, PACKED=geometry.packed,
            num_warps=4)

    def source(self, block: int):
        if not uses_tma(self.statistics):
            return self.statistics, self.rows * self.columns, self.columns
        return TensorDescriptor(self.statistics, [2, self.rows, self.columns], [self.rows * self.columns, self.columns, 1],
                                [1, 1, block])


def _scaled(v, scale, geometry) -> Rows:
    """scale * v of every query head, [B, Sk, Hq, D] (or packed)."""
    rows = v if v.dim() == 4 else v[None]
    scaled = torch.empty((*rows.shape[:2], geometry.heads, geometry.head_dim), dtype=v.dtype, device=v.device)
    _scale_v[(geometry.programs(geometry.len_k, _ROWS, geometry.heads),)](
        v, *rows.stride()[:3], scaled, geometry.cu_k, *factor_arguments(scale, geometry), geometry.num_seqs, geometry.len_k,
        geometry.tiles(geometry.len_k, _ROWS), geometry.heads, GROUP=geometry.group, HEAD_DIM=geometry.head_dim,
        BLOCK_D=padded_head_dim(geometry.head_dim), BLOCK_N=_ROWS, PACKED=geometry.packed, num_warps=4)
    return Rows(scaled)


def _reduced(sums, like, geometry, cu, block):
    """Per-tile sums [tiles, Hq, D] to the gradient of a scale or offset, in its own shape."""
    each = per_sequence(like, geometry)
    result = sums.new_empty(geometry.num_seqs if each else 1, geometry.heads, geometry.head_dim)
    _sum_tiles[(geometry.heads, result.shape[0])](
        sums, result, cu, sums.shape[0] // geometry.batch, sums.shape[0], geometry.heads, HEAD_DIM=geometry.head_dim,
        BLOCK_D=padded_head_dim(geometry.head_dim), BLOCK=block, PER_SEQUENCE=each, PACKED=geometry.packed, STEP=16, num_warps=4)
    return geometry.reduce_factor(result, like)


def _grad_offset(grad_out, out, lse, offset, geometry):
    """grad_offset alone."""
    if grad_out.numel() == 0:
        return torch.zeros_like(offset)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    with on_device(out):
        return _reduced(_Prepared(grad_out, out, lse, None, offset, True, geometry).sums, offset, geometry, geometry.cu_q, _ROWS)


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, scale=None, offset=None, *, needs=(True,) * 5, cos=None, sin=None,
                       positions=None, positions_k=None, interleaved=False, softmax_scale=None, causal=True, window=None,
                       cu_seqlens=None, cu_seqlens_k=None, max_seqlen=None, max_seqlen_k=None, deterministic=False):
    """seal::attention_backward (docs/ops.md). Repeatable whether or not `deterministic` asks for it."""
    geometry = Geometry.of(q, k, softmax_scale, causal, window, cu_seqlens, cu_seqlens_k)
    need_q, need_k, need_v = needs[:3]
    need_scale, need_offset = needs[3] and scale is not None, needs[4] and offset is not None
    absent = q.new_empty(0)
    no_sum = q.new_empty(0, dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:  # no query or no key: every gradient is zero, save that of the offset
        zeros = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) if need else absent
                 for t, need in ((q, need_q), (k, need_k), (v, need_v)))
        return (*zeros, torch.zeros_like(scale) if need_scale else no_sum,
                _grad_offset(grad_out, out, lse, offset, geometry) if need_offset else no_sum)

    options = dict(BLOCK_D=padded_head_dim(geometry.head_dim), HEAD_DIM=geometry.head_dim)
    loops = dict(options, GROUP=geometry.group, PRECISION=precision(q.dtype), TMA=uses_tma(q), **geometry.mask_constants)
    rows_q, rows_k, rows_v, rows_g = (Rows(x) for x in (q, k, v, grad_out))
    lengths = (geometry.num_seqs, geometry.len_q, geometry.len_k)
    factor = factor_arguments(scale, geometry)
    with on_device(q):
        prepared = _Prepared(rows_g.tensor, out, lse, grad_lse, offset, need_offset, geometry)
        grad_offset = _reduced(prepared.sums, offset, geometry, geometry.cu_q, _ROWS) if need_offset else no_sum

        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else absent
        if need_q:
            def launch_dq(tile):
                _dq[(geometry.programs(geometry.len_q, tile.m, geometry.heads),)](
                    rows_q.source(tile.m), rows_k.source(tile.n), rows_v.source(tile.n), rows_g.source(tile.m),
                    prepared.statistics, grad_q, geometry.cu_q, geometry.cu_k, *factor, geometry.sigma, geometry.sigma * LOG2E,
                    *lengths, prepared.columns, geometry.tiles(geometry.len_q, tile.m), geometry.heads, geometry.left, geometry.right, BLOCK_M=tile.m,
                    BLOCK_N=tile.n, **loops, **tile.options)
            choose("dq", q, launch_dq)

        grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_k else None
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need_v else None
        grad_scale = no_sum
        if need_k or need_v or need_scale:
            part = lse.new_empty(k.shape) if scale is not None and need_v and geometry.group > 1 else None
            scaled_v = None if scale is None else _scaled(rows_v.tensor, scale, geometry)
            found = {}

            def launch_dkdv(tile):
                tiles = geometry.tiles(geometry.len_k, tile.n)
                found["sums"] = (lse.new_zeros(tiles * geometry.batch, geometry.heads, geometry.head_dim) if need_scale else None)
                _dkdv[(geometry.programs(geometry.len_k, tile.n, geometry.kv_heads),)](
                    rows_q.source(tile.m), rows_k.source(tile.n), rows_v.source(tile.n),
                    None if scaled_v is None else scaled_v.source(tile.n), rows_g.source(tile.m),
                    prepared.source(tile.m), grad_k, grad_v, part, found["sums"], geometry.cu_q, geometry.cu_k, *factor, geometry.sigma,
                    geometry.sigma * LOG2E, *lengths, tiles, geometry.kv_heads, geometry.left, geometry.right, BLOCK_M=tile.m,
                    BLOCK_N=tile.n, NEED_DK=need_k, **loops, **tile.options)
            tile = choose("dkdv", q, launch_dkdv)
            if need_scale:
                grad_scale = _reduced(found["sums"], scale, geometry, geometry.cu_k, tile.n)
        if cos is not None and (need_q or need_k):
            rotate_in_place(grad_q if need_q else None, grad_k, geometry.len_q, geometry.len_k, cos, sin, positions, positions_k,
                            interleaved)
    return grad_q, absent if grad_k is None else grad_k, absent if grad_v is None else grad_v, grad_scale, grad_offset
