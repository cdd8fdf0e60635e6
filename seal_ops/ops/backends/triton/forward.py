"""Forward attention: out = scale * softmax(sigma Q K^T + mask) V + offset, and the log-sum-exp; with terms.py's terms.

One program owns a tile of query rows of one head. It walks the key blocks that need no mask first, then the few that do
(the diagonal, the far edge of a window, the tail of the sequence), with the running maximum and sum of an online
softmax in base 2.
"""

import torch
import triton
import triton.language as tl

from ... import factors
from . import decode
from .configs import choose
from .host import BlockLists, Geometry, Rows, factor_arguments, gate_arguments, on_device, padded_head_dim, uses_tma
from .online_softmax import key_loop
from .terms import load_gate, opened, with_sink
from .tiling import LN2, LOG2E, load_factor, load_rows, locate
from .walk import MASK_ARGUMENTS, key_blocks, listed

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["num_seqs", "len_q", "len_k", "tiles", *MASK_ARGUMENTS])
def _forward(
    q_source,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    scale,
    offset,
    sink_ptr,
    gate,
    qk_scale,
    cap,
    num_seqs,
    len_q,
    len_k,
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
    POSITIVE: tl.constexpr,
    TMA: tl.constexpr,
    GATE: tl.constexpr,
):
    PACKED: tl.constexpr = cu_q_ptr is not None
    all_q = len_q  # tokens of a batch row, or of all packed sequences
    head, batch, seq, tile, start_q, len_q, start_k, len_k = locate(
        tl.program_id(0), tiles, heads, num_seqs, cu_q_ptr, cu_k_ptr, len_q, len_k, BLOCK_M
    )
    first = (tl.cdiv(len_q, BLOCK_M) - 1 - tile) * BLOCK_M  # causal: the longest rows first, so that the tail is short
    if first < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    if shift is not None:
        shift = tl.where(head >= shifted_from, shift, 0)
    bounds = (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks)
    if lists is None:
        blocks = key_blocks(first, bounds, BLOCK_M, BLOCK_N)
    else:
        blocks = listed(lists, batch, head, first, BLOCK_N)
    q = load_rows(q_source, batch, head, start_q, first, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, top = key_loop(
        acc,
        total,
        top,
        q,
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
        POSITIVE,
        TMA,
    )
    acc, total, top = key_loop(
        acc,
        total,
        top,
        q,
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
        POSITIVE,
        TMA,
    )

    if sink_ptr is not None:
        acc, total, top = with_sink(acc, total, top, tl.load(sink_ptr + head).to(tl.float32) * _LOG2E)
    d = tl.arange(0, BLOCK_D)
    lse = tl.where(total > 0, (top + tl.log2(total)) * _LN2, float("-inf"))
    acc = acc * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    if scale is not None:
        acc = acc * load_factor(scale, seq, head, HEAD_DIM, BLOCK_D)
    if gate is not None:
        acc = acc * opened(load_gate(gate, batch, start_q + rows, head, rows < len_q, HEAD_DIM, BLOCK_D), GATE)
    if offset is not None:
        acc = acc + load_factor(offset, seq, head, HEAD_DIM, BLOCK_D)
    inside = rows < len_q
    tokens = batch.to(tl.int64) * all_q + start_q + rows
    tl.store(
        out_ptr + (tokens * heads + head)[:, None] * HEAD_DIM + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < HEAD_DIM),
    )
    tl.store(lse_ptr + (batch * heads + head).to(tl.int64) * all_q + start_q + rows, lse, mask=inside)


def attention(
    q,
    k,
    v,
    scale=None,
    offset=None,
    *,
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
    """seal::attention (docs/ops.md). max_seqlen only tells that queries are few, and nothing here is ever
    nondeterministic."""
    geometry = Geometry.of(q, k, softmax_scale, causal, window, mask, cu_seqlens, cu_seqlens_k, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], geometry.heads, geometry.len_q), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if k.numel() == 0:  # no descriptor can stand over nothing: every row is an empty one
        _fill_empty(out, lse, offset, sink, geometry)
        return out, lse
    longest = geometry.len_q if max_seqlen is None else max_seqlen
    lists = None if blocks is None else BlockLists(blocks, block_size, geometry)
    if lists is None and decode.preferred(geometry, longest):
        decode.attention(
            q, k, v, scale, offset, out, lse, geometry, longest, sink=sink, gate=gate, function=gate_function
        )
        return out, lse
    rows_q, rows_k, rows_v = (Rows(x) for x in (q, k, v))

    def launch(tile):
        _forward[(geometry.programs(geometry.len_q, tile.m, geometry.heads),)](
            rows_q.source(tile.m),
            rows_k.source(tile.n),
            rows_v.source(tile.n),
            out,
            lse,
            geometry.cu_q,
            geometry.cu_k,
            factor_arguments(scale, geometry),
            factor_arguments(offset, geometry),
            sink,
            gate_arguments(gate),
            geometry.qk_scale,
            geometry.cap,
            geometry.num_seqs,
            geometry.len_q,
            geometry.len_k,
            geometry.tiles(geometry.len_q, tile.m),
            geometry.heads,
            *geometry.mask,
            None if lists is None else lists.of_keys,
            GROUP=geometry.group,
            HEAD_DIM=geometry.head_dim,
            BLOCK_D=padded_head_dim(geometry.head_dim),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            POSITIVE=geometry.positive,
            TMA=uses_tma(q),
            GATE=gate_function,
            **tile.options,
        )

    with on_device(q):
        choose("forward", q, launch, lists and lists.size)
    return out, lse


def _fill_empty(out, lse, offset, sink, geometry):
    """Rows without any key: the offset alone (0 without one), and a log-sum-exp of -inf, or of the sink alone."""
    if sink is None:
        lse.fill_(float("-inf"))
    else:
        lse.copy_(sink[:, None].expand_as(lse))
    if offset is None:
        out.zero_()
        return
    view = factors.full_view(offset, geometry.heads, geometry.head_dim)
    if geometry.packed and view.shape[0] > 1:
        view = view[torch.repeat_interleave(geometry.cu_q.diff(), output_size=geometry.len_q)]
        out.copy_(view)
    else:
        out.copy_(view[0] if geometry.packed else view[:, None])
