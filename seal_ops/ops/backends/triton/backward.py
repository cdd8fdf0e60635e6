"""Backward attention without atomics, so bitwise repeatable: every gradient element is written by the one program that
owns it.

    _dkdv  owns a tile of keys of one key/value head, walks the query blocks of all query heads of its group
    _dq    owns a tile of queries of one head, walks the key blocks

Seven matrix products instead of the five of a kernel that adds grad_q atomically; no fp32 copy of grad_q in exchange.

The gradient of the scale is nearly free: grad_scale_c = sum_k V_kc (P^T g)_kc, and P^T g is what _dkdv accumulates
anyway before it multiplies with the scale. So it is exact where the scale is 0.
"""

import torch
import triton
import triton.language as tl

from .configs import choose, split
from .host import BlockLists, Geometry, Rows, factor_arguments, on_device, padded_head_dim, uses_tma
from .preprocess import TOKENS, Statistics, scaled_v, sum_tiles
from .rotary import rotate_in_place
from .terms import bent
from .tiling import aligned_column, load_factor, load_rows, load_statistics, locate, product
from .walk import MASK_ARGUMENTS, block_start, key_blocks, listed, loop_range, query_blocks, seen


@triton.jit
def _query_loop(
    dk,
    dv,
    k,
    v,
    q_source,
    g_source,
    statistics,
    batch,
    head,
    start,
    row,
    column,
    keys,
    blocks,
    bounds,
    qk_scale,
    cap,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds dS^T Q to dk and P^T g to dv over the full query blocks, or over the masked ones."""
    len_q = bounds[0]
    lower, upper = loop_range(blocks, MASKED)
    for i in tl.range(lower, upper):
        first = block_start(i, blocks, BLOCK_M, MASKED)
        q = load_rows(q_source, batch, head, start, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, MASKED)
        g = load_rows(g_source, batch, head, start, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, MASKED)
        if MASKED:
            rows = first + tl.arange(0, BLOCK_M)
            if PACKED and TMA:  # rows of the next sequence may hold NaN, and 0 * NaN would reach us
                q = tl.where(rows[:, None] < len_q, q, 0.0)
                g = tl.where(rows[:, None] < len_q, g, 0.0)
        lse = load_statistics(statistics, 0, row, column + first, BLOCK_M, TMA)
        delta = load_statistics(statistics, 1, row, column + first, BLOCK_M, TMA)
        s = product(k, q.T, None)
        if cap is None:
            p = tl.exp2(s * qk_scale - lse[None, :])
        else:
            s = bent(s * qk_scale, q.dtype == tl.float32)
            p = tl.exp2(s * cap - lse[None, :])
        if MASKED:
            allowed = seen(rows[None, :], keys[:, None], bounds)
            p = tl.where(allowed, p, 0.0)
        if NEED_DV:
            dv = product(p.to(g.dtype), g, dv)
        if NEED_DK:
            dp = product(v, g.T, None)
            ds = p * (dp - delta[None, :])
            if cap is not None:
                ds *= 1.0 - s * s
            if MASKED:
                ds = tl.where(allowed, ds, 0.0)
            dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["num_seqs", "len_q", "len_k", "tiles", *MASK_ARGUMENTS])
def _dkdv(
    q_source,
    k_source,
    v_source,
    scaled_v_source,
    g_source,
    statistics,
    dk_ptr,
    dv_ptr,
    part_ptr,
    sums_ptr,
    cu_q_ptr,
    cu_k_ptr,
    scale,
    sigma,
    qk_scale,
    cap,
    num_seqs,
    len_q,
    len_k,
    tiles,
    kv_heads,
    lower,
    upper,
    chunk,
    chunk_lower,
    chunk_upper,
    shift,
    shifted_from,
    sinks,
    lists,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    PACKED: tl.constexpr = cu_q_ptr is not None
    NEED_DK: tl.constexpr = dk_ptr is not None
    NEED_DV: tl.constexpr = (dv_ptr is not None) or (sums_ptr is not None)
    all_k = len_k
    kv_head, batch, seq, tile, start_k, len_k, start_q, len_q = locate(
        tl.program_id(0), tiles, kv_heads, num_seqs, cu_k_ptr, cu_q_ptr, len_k, len_q, BLOCK_N
    )
    first = tile * BLOCK_N  # causal: the first keys are seen most often, so the longest programs come first
    if first >= len_k:
        return
    keys = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    if shift is not None:
        shift = tl.where(kv_head * GROUP >= shifted_from, shift, 0)
    bounds = (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks)
    if lists is None:
        every_head = query_blocks(first, bounds, BLOCK_M, BLOCK_N)
    column = aligned_column(start_q, seq, PACKED)
    at = ((batch.to(tl.int64) * all_k + start_k + keys) * kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
    valid = (keys < len_k)[:, None] & (d[None, :] < HEAD_DIM)
    k = load_rows(k_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)
    if scaled_v_source is None:
        v = load_rows(v_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        row = batch * kv_heads * GROUP + head
        if lists is None:
            blocks = every_head
        else:
            blocks = listed(lists, batch, head, first, BLOCK_M)
        if scale is not None:
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if scaled_v_source is not None:
            v = load_rows(scaled_v_source, batch, head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True)
        dk, dv = _query_loop(
            dk,
            dv,
            k,
            v,
            q_source,
            g_source,
            statistics,
            batch,
            head,
            start_q,
            row,
            column,
            keys,
            blocks,
            bounds,
            qk_scale,
            cap,
            BLOCK_M,
            HEAD_DIM,
            BLOCK_D,
            False,
            PACKED,
            NEED_DK,
            NEED_DV,
            TMA,
        )
        dk, dv = _query_loop(
            dk,
            dv,
            k,
            v,
            q_source,
            g_source,
            statistics,
            batch,
            head,
            start_q,
            row,
            column,
            keys,
            blocks,
            bounds,
            qk_scale,
            cap,
            BLOCK_M,
            HEAD_DIM,
            BLOCK_D,
            True,
            PACKED,
            NEED_DK,
            NEED_DV,
            TMA,
        )
        if NEED_DV and scale is not None:
            if sums_ptr is not None:
                plain_v = load_rows(
                    v_source, batch, kv_head, start_k, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, True
                )
                product_sum = tl.sum(tl.where(valid, plain_v.to(tl.float32) * dv, 0.0), 0)
                number = batch * tiles + (tl.program_id(0) % tiles)
                tl.store(
                    sums_ptr + (number.to(tl.int64) * kv_heads * GROUP + head) * HEAD_DIM + d,
                    product_sum,
                    mask=d < HEAD_DIM,
                )
            dv *= load_factor(scale, seq, head, HEAD_DIM, BLOCK_D)
            if (
                GROUP > 1 and dv_ptr is not None
            ):  # every head has its own scale: the group's sum waits in memory, where only
                if member > 0:  # this program touches it
                    tl.debug_barrier()
                    dv += tl.load(part_ptr + at, mask=valid, other=0.0)
                if member < GROUP - 1:
                    tl.store(part_ptr + at, dv, mask=valid)
    if dv_ptr is not None:
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=valid)
    if NEED_DK:
        tl.store(dk_ptr + at, (dk * sigma).to(dk_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _key_loop(
    dq,
    q,
    g,
    lse,
    delta,
    k_source,
    v_source,
    batch,
    kv_head,
    start,
    rows,
    blocks,
    bounds,
    qk_scale,
    cap,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds dS K to dq over the full key blocks, or over the masked ones."""
    len_k = bounds[1]
    lower, upper = loop_range(blocks, MASKED)
    for i in tl.range(lower, upper):
        first = block_start(i, blocks, BLOCK_N, MASKED)
        k = load_rows(k_source, batch, kv_head, start, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        v = load_rows(v_source, batch, kv_head, start, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        keys = first + tl.arange(0, BLOCK_N)
        if MASKED and PACKED and TMA:  # rows of the next sequence may hold NaN, and 0 * NaN would reach us
            k = tl.where(keys[:, None] < len_k, k, 0.0)
        s = product(q, k.T, None)
        dp = product(g, v.T, None)
        if cap is None:
            ds = tl.exp2(s * qk_scale - lse[:, None]) * (dp - delta[:, None])
        else:
            s = bent(s * qk_scale, q.dtype == tl.float32)
            ds = tl.exp2(s * cap - lse[:, None]) * (dp - delta[:, None]) * (1.0 - s * s)
        if MASKED:
            ds = tl.where(seen(rows[:, None], keys[None, :], bounds), ds, 0.0)
        dq = product(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["num_seqs", "len_q", "len_k", "columns", "tiles", *MASK_ARGUMENTS])
def _dq(
    q_source,
    k_source,
    v_source,
    g_source,
    statistics_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    scale,
    sigma,
    qk_scale,
    cap,
    num_seqs,
    len_q,
    len_k,
    columns,
    tiles,
    heads,
    lower,
    upper,
    chunk,
    chunk_lower,
    chunk_upper,
    shift,
    shifted_from,
    sinks,
    lists,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    PACKED: tl.constexpr = cu_q_ptr is not None
    all_q = len_q
    head, batch, seq, tile, start_q, len_q, start_k, len_k = locate(
        tl.program_id(0), tiles, heads, num_seqs, cu_q_ptr, cu_k_ptr, len_q, len_k, BLOCK_M
    )
    first = (tl.cdiv(len_q, BLOCK_M) - 1 - tile) * BLOCK_M  # causal: the longest rows first
    if first < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < len_q
    d = tl.arange(0, BLOCK_D)
    if shift is not None:
        shift = tl.where(head >= shifted_from, shift, 0)
    bounds = (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks)
    if lists is None:
        blocks = key_blocks(first, bounds, BLOCK_M, BLOCK_N)
    else:
        blocks = listed(lists, batch, head, first, BLOCK_N)
    q = load_rows(q_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, True)
    g = load_rows(g_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, True)
    if scale is not None:
        g = (g * load_factor(scale, seq, head, HEAD_DIM, BLOCK_D)).to(g.dtype)
    at = (batch * heads + head).to(tl.int64) * columns + aligned_column(start_q, seq, PACKED) + rows
    lse = tl.load(statistics_ptr + at, mask=inside, other=0.0)
    delta = tl.load(statistics_ptr + tl.num_programs(0).to(tl.int64) // tiles * columns + at, mask=inside, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _key_loop(
        dq,
        q,
        g,
        lse,
        delta,
        k_source,
        v_source,
        batch,
        head // GROUP,
        start_k,
        rows,
        blocks,
        bounds,
        qk_scale,
        cap,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        False,
        PACKED,
        TMA,
    )
    dq = _key_loop(
        dq,
        q,
        g,
        lse,
        delta,
        k_source,
        v_source,
        batch,
        head // GROUP,
        start_k,
        rows,
        blocks,
        bounds,
        qk_scale,
        cap,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        True,
        PACKED,
        TMA,
    )
    tokens = batch.to(tl.int64) * all_q + start_q + rows
    tl.store(
        dq_ptr + (tokens * heads + head)[:, None] * HEAD_DIM + d[None, :],
        (dq * sigma).to(dq_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < HEAD_DIM),
    )


class _Call:
    """One backward call: its tensors as tiles can be read from them, and the launches of the two matrix kernels."""

    def __init__(self, grad_out, q, k, v, scale, statistics: Statistics, geometry: Geometry, lists: BlockLists | None):
        self.rows_q, self.rows_k, self.rows_v, self.rows_g = Rows(q), Rows(k), Rows(v), grad_out
        self.like, self.scale, self.statistics, self.geometry = q, scale, statistics, geometry
        self.factor = factor_arguments(scale, geometry)
        self.lists, self.size = lists, lists and lists.size
        self.numbers = (
            geometry.sigma,
            geometry.qk_scale,
            geometry.cap,
            geometry.num_seqs,
            geometry.len_q,
            geometry.len_k,
        )
        self.constants = dict(
            GROUP=geometry.group,
            HEAD_DIM=geometry.head_dim,
            BLOCK_D=padded_head_dim(geometry.head_dim),
            TMA=uses_tma(q),
        )

    def grad_q(self):
        geometry = self.geometry
        result = torch.empty(self.like.shape, dtype=self.like.dtype, device=self.like.device)

        def launch(tile):
            _dq[(geometry.programs(geometry.len_q, tile.m, geometry.heads),)](
                self.rows_q.source(tile.m),
                self.rows_k.source(tile.n),
                self.rows_v.source(tile.n),
                self.rows_g.source(tile.m),
                self.statistics.tensor,
                result,
                geometry.cu_q,
                geometry.cu_k,
                self.factor,
                *self.numbers,
                self.statistics.columns,
                geometry.tiles(geometry.len_q, tile.m),
                geometry.heads,
                *geometry.mask,
                None if self.lists is None else self.lists.of_keys,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                **self.constants,
                **tile.options,
            )

        choose("dq" if self.scale is None or geometry.packed else "dq_scaled", self.like, launch, self.size)
        return result

    def grad_k_v_scale(self, k, v, need_k: bool, need_v: bool, need_scale: bool):
        """Each None where it is not needed."""
        geometry = self.geometry
        grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_k else None
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need_v else None
        scaled = scaled_v(self.rows_v.tensor, self.scale, geometry) if need_k and self.scale is not None else None
        if not split(k):
            return grad_k, grad_v, self._launch_dkdv("dkdv", grad_k, grad_v, scaled, need_scale)
        if need_k:
            self._launch_dkdv("dk", grad_k, None, scaled, False)
        return grad_k, grad_v, self._launch_dkdv("dv", None, grad_v, None, need_scale) if need_v or need_scale else None

    def _launch_dkdv(self, kernel: str, grad_k, grad_v, scaled: Rows | None, need_scale: bool):
        """Fills grad_k and grad_v where given; returns the gradient of the scale if it is wanted."""
        geometry, device = self.geometry, self.like.device
        shares_v = self.scale is not None and grad_v is not None and geometry.group > 1
        part = torch.empty(grad_v.shape, dtype=torch.float32, device=device) if shares_v else None
        sums = None

        def launch(tile):
            nonlocal sums
            tiles = geometry.tiles(geometry.len_k, tile.n)
            if need_scale:  # packed: a sequence may own a tile too many, whose sum stays zero
                sums = torch.zeros(tiles * geometry.batch, geometry.heads, geometry.head_dim, device=device)
            _dkdv[(geometry.programs(geometry.len_k, tile.n, geometry.kv_heads),)](
                self.rows_q.source(tile.m),
                self.rows_k.source(tile.n),
                self.rows_v.source(tile.n),
                None if scaled is None else scaled.source(tile.n),
                self.rows_g.source(tile.m),
                self.statistics.source(tile.m),
                grad_k,
                grad_v,
                part,
                sums,
                geometry.cu_q,
                geometry.cu_k,
                self.factor,
                *self.numbers,
                tiles,
                geometry.kv_heads,
                *geometry.mask,
                None if self.lists is None else self.lists.of_queries,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                **self.constants,
                **tile.options,
            )

        tile = choose(kernel, self.like, launch, self.size)
        return sum_tiles(sums, self.scale, geometry, geometry.cu_k, tile.n) if need_scale else None


def attention_backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    scale=None,
    offset=None,
    *,
    needs=(True,) * 7,
    cos=None,
    sin=None,
    positions=None,
    positions_k=None,
    interleaved=False,
    softmax_scale=None,
    causal=True,
    window=None,
    mask=None,
    blocks=None,
    block_size=128,
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    deterministic=False,
    sink=None,
    gate=None,
    gate_function="sigmoid",
    softcap=None,
):
    """seal::attention_backward (docs/ops.md). Repeatable whether or not `deterministic` asks for it."""
    geometry = Geometry.of(q, k, softmax_scale, causal, window, mask, cu_seqlens, cu_seqlens_k, softcap)
    inputs = dict(q=q, k=k, v=v, scale=scale, offset=offset, sink=sink, gate=gate)
    need = {name: want and inputs[name] is not None for name, want in zip(inputs, (*needs, False, False))}
    found = dict.fromkeys(inputs)
    if q.numel() == 0:
        found = {name: torch.zeros_like(t) if need[name] else None for name, t in inputs.items()}
    else:
        with on_device(q):
            rows_g = Rows(grad_out)
            statistics = Statistics(
                rows_g.tensor, out, lse, grad_lse, offset, sink, gate, gate_function, geometry, need
            )  # fmt: skip
            found |= dict(sink=statistics.grad_sink, gate=statistics.grad_gate)
            if need["offset"]:
                found["offset"] = sum_tiles(statistics.sums, offset, geometry, geometry.cu_q, TOKENS)
            if k.numel() == 0:  # nothing is attended to
                found |= {n: None if inputs[n] is None else torch.zeros_like(inputs[n]) for n in (*"qkv", "scale")}
            else:
                lists = None if blocks is None else BlockLists(blocks, block_size, geometry)
                if statistics.gated is not None:
                    rows_g = Rows(statistics.gated)
                call = _Call(rows_g, q, k, v, scale, statistics, geometry, lists)
                if need["q"]:
                    found["q"] = call.grad_q()
                if need["k"] or need["v"] or need["scale"]:
                    wanted = (need[name] for name in ("k", "v", "scale"))
                    found["k"], found["v"], found["scale"] = call.grad_k_v_scale(k, v, *wanted)
                if cos is not None and (need["q"] or need["k"]):
                    angles = (cos, sin, positions, positions_k, interleaved)
                    rotate_in_place(found["q"], found["k"], geometry.len_q, geometry.len_k, *angles)
    sums = ("scale", "offset", "sink")  # an empty tensor each: outputs of an op may not alias each other
    nothing = lambda name: q.new_empty(0, dtype=torch.float32 if name in sums else q.dtype)
    return tuple(found[name] if need[name] else nothing(name) for name in inputs)
