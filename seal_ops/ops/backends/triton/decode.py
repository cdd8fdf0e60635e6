"""Attention of few queries over many keys (decoding): the keys are split over programs; a second kernel combines.

A program has one part of one KV head's keys. Its rows are the queries times the query heads that share it, so K and V
are read once whatever the group; bytes decide here, not products.
"""

import functools

import torch
import triton
import triton.language as tl

from .configs import choose
from .host import Geometry, Rows, factor_arguments, gate_arguments, on_device, padded_head_dim, strides, uses_tma
from .online_softmax import key_loop
from .terms import load_gate, opened, with_sink
from .tiling import LN2, LOG2E, load_factor
from .walk import MASK_ARGUMENTS, key_blocks_of

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_MOST_SPLITS = 512
_LEAST_KEYS = 256  # of a split: one of fewer would spend its time on starting
_PROGRAMS = 2  # at work on a multiprocessor at a time


@triton.jit
def _inverse(total):
    """1 / total, 0 for a row that sees no key."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _scaled(acc, scale, offset, seq, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc [rows, BLOCK_D] with the scale and offset of each row's head [rows]."""
    if scale is not None:
        acc = acc * _factors(scale, seq, head, HEAD_DIM, BLOCK_D)
    if offset is not None:
        acc = acc + _factors(offset, seq, head, HEAD_DIM, BLOCK_D)
    return acc


@triton.jit
def _factors(factor, seq, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: load_factor for a head a row."""
    ptr, stride_b, stride_h, stride_d = factor
    d = tl.arange(0, BLOCK_D)
    at = seq.to(tl.int64) * stride_b + head[:, None] * stride_h + d[None, :] * stride_d
    return tl.load(ptr + at, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["len_q", "len_k", "row_blocks", "kv_heads", "group", "splits", *MASK_ARGUMENTS])
def _split(
    q_ptr,
    q_strides,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    scale,
    offset,
    sink_ptr,
    gate,
    qk_scale,
    cap,
    len_q,
    len_k,
    row_blocks,
    kv_heads,
    group,
    splits,
    lower,
    upper,
    chunk,
    chunk_lower,
    chunk_upper,
    shift,
    shifted_from,
    sinks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POSITIVE: tl.constexpr,
    TMA: tl.constexpr,
    GATE: tl.constexpr,
):
    """One split of one KV head: normalised partial results and log-sum-exp; with partial_ptr None the final ones."""
    PACKED: tl.constexpr = cu_q_ptr is not None
    all_q = len_q
    pid = tl.program_id(0)  # neighbours: the same keys, then the other heads of the same tokens, then the splits
    row_block = pid % row_blocks
    kv_head = (pid // row_blocks) % kv_heads
    split = (pid // (row_blocks * kv_heads)) % splits
    seq = pid // (row_blocks * kv_heads * splits)
    if PACKED:
        start_q = tl.load(cu_q_ptr + seq)
        len_q = tl.load(cu_q_ptr + seq + 1) - start_q
        start_k = tl.load(cu_k_ptr + seq)
        len_k = tl.load(cu_k_ptr + seq + 1) - start_k
        batch = tl.full((), 0, tl.int32)
    else:
        batch = seq
        start_q = tl.full((), 0, tl.int32)
        start_k = tl.full((), 0, tl.int32)
    if shift is not None:
        shift = tl.where(kv_head * group >= shifted_from, shift, 0)
    bounds = (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks)
    d = tl.arange(0, BLOCK_D)
    stride_b, stride_s, stride_h = q_strides
    # One turn, unless a packed sequence has more queries than max_seqlen promised.
    for first in tl.range(row_block * BLOCK_M, len_q * group, row_blocks * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        query = rows // group
        head = kv_head * group + rows % group
        inside = rows < len_q * group
        written = inside[:, None] & (d < HEAD_DIM)[None, :]
        at = batch.to(tl.int64) * stride_b + (start_q + query).to(tl.int64) * stride_s + head.to(tl.int64) * stride_h
        q = tl.load(q_ptr + at[:, None] + d[None, :], mask=written, other=0.0)

        blocks = key_blocks_of(first // group, tl.minimum((first + BLOCK_M - 1) // group, len_q - 1), bounds, BLOCK_N)
        begin = blocks[0]
        end = blocks[3]
        if sinks is not None:  # counted as if they lay before the range
            sink_blocks = blocks[5]
            before = begin
            begin -= sink_blocks
        share = (end - begin) // splits
        more = (end - begin) % splits
        begin += split * share + tl.minimum(split, more)
        end = begin + share + tl.where(split < more, 1, 0)
        if sinks is not None:
            sink_begin = tl.minimum(begin - before, 0) + sink_blocks
            sink_end = tl.minimum(end - before, 0) + sink_blocks
            begin = tl.maximum(begin, before)
            end = tl.maximum(end, before)
        full_begin = tl.minimum(tl.maximum(blocks[1], begin), end)
        full_end = tl.minimum(tl.maximum(blocks[2], full_begin), end)
        if sinks is not None:
            share_blocks = (begin, full_begin, full_end, end, sink_begin, sink_end)
        else:
            share_blocks = (begin, full_begin, full_end, end)
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
            kv_head,
            start_k,
            query,
            share_blocks,
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
            kv_head,
            start_k,
            query,
            share_blocks,
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

        if sink_ptr is not None and partial_ptr is None:  # else it joins where the splits do
            acc, total, top = with_sink(acc, total, top, tl.load(sink_ptr + head).to(tl.float32) * _LOG2E)
        lse = tl.where(total > 0, (top + tl.log2(total)) * _LN2, float("-inf"))
        acc = acc * _inverse(total)[:, None]
        token = batch.to(tl.int64) * all_q + start_q + query
        result = token * (kv_heads * group) + head
        if partial_ptr is not None:
            result = result * splits + split
            tl.store(partial_ptr + result[:, None] * HEAD_DIM + d[None, :], acc, mask=written)
            tl.store(partial_lse_ptr + result, lse, mask=inside)
        else:
            acc = _scaled(acc, scale, offset, seq, head, HEAD_DIM, BLOCK_D)
            if gate is not None:
                acc = acc * opened(load_gate(gate, batch, start_q + query, head, inside, HEAD_DIM, BLOCK_D), GATE)
            tl.store(out_ptr + result[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=written)
            tl.store(
                lse_ptr + (batch * kv_heads * group + head).to(tl.int64) * all_q + start_q + query, lse, mask=inside
            )


@triton.jit(do_not_specialize=["len_q", "splits", "num_seqs"])
def _combine(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    scale,
    offset,
    sink_ptr,
    gate,
    num_seqs,
    len_q,
    splits,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GATE: tl.constexpr,
):
    """The results of one query and head, weighted by their log-sum-exp; with what follows a softmax."""
    result = tl.program_id(0)  # of [tokens, heads]
    head = result % heads
    token = result // heads
    if cu_q_ptr is not None:
        seq = tl.full((), 0, tl.int32)
        end = num_seqs
        while end - seq > 1:  # the last sequence that begins at or before the token
            middle = (seq + end) // 2
            before = tl.load(cu_q_ptr + middle) <= token
            seq = tl.where(before, middle, seq)
            end = tl.where(before, end, middle)
        row = head.to(tl.int64) * len_q + token
    else:
        seq = token // len_q
        row = (seq * heads + head).to(tl.int64) * len_q + token % len_q
    first = result.to(tl.int64) * splits
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for at in tl.range(0, splits, BLOCK_S):
        top = tl.maximum(top, tl.load(partial_lse_ptr + first + at + s, mask=at + s < splits, other=float("-inf")))
    base = tl.max(top, 0)
    if sink_ptr is not None:
        own = tl.load(sink_ptr + head).to(tl.float32)
        base = tl.maximum(base, own)
    base = tl.where(base == float("-inf"), 0.0, base)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for at in tl.range(0, splits, BLOCK_S):
        here = at + s < splits
        weight = tl.exp2((tl.load(partial_lse_ptr + first + at + s, mask=here, other=float("-inf")) - base) * _LOG2E)
        part = tl.load(
            partial_ptr + (first + at + s)[:, None] * HEAD_DIM + d[None, :],
            mask=here[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc += weight[:, None] * part
        total += weight
    whole = tl.sum(total, 0)
    if sink_ptr is not None:
        whole += tl.exp2((own - base) * _LOG2E)
    out = tl.sum(acc, 0)[None, :] * _inverse(whole)
    if scale is not None:
        out = out * load_factor(scale, seq, head, HEAD_DIM, BLOCK_D)
    if gate is not None:
        at = tl.zeros([1], tl.int32) + token
        batch = seq
        if cu_q_ptr is None:
            at -= seq * len_q
        else:
            batch *= 0
        out = out * opened(load_gate(gate, batch, at, head, at >= 0, HEAD_DIM, BLOCK_D), GATE)
    if offset is not None:
        out = out + load_factor(offset, seq, head, HEAD_DIM, BLOCK_D)
    tl.store(
        out_ptr + result.to(tl.int64) * HEAD_DIM + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(d < HEAD_DIM)[None, :],
    )
    tl.store(lse_ptr + row, tl.where(whole > 0, base + tl.log2(whole) * _LN2, float("-inf")))


def preferred(geometry: Geometry, longest: int) -> bool:
    """Whether this kernel is the better one: at most `longest` queries a sequence, few, and several times as many keys.
    With one head a KV head and enough of them the ordinary kernel reads every key once and keeps the GPU as busy."""
    idle = geometry.group > 1 or geometry.num_seqs * geometry.heads < 128
    few = longest <= 8 or (longest * geometry.group <= 64 and idle)
    return few and 4 * longest <= visible_keys(geometry, longest)


def visible_keys(geometry: Geometry, longest: int) -> int:
    """Keys that a sequence's queries see between them. Packed: of a sequence of mean length."""
    keys = geometry.len_k // geometry.num_seqs if geometry.packed else geometry.len_k
    seen = geometry.seen
    width = seen.upper - seen.lower + 1
    if seen.chunk:
        width = min(width, (seen.chunk_upper - seen.chunk_lower + 1) * seen.chunk)
    return min(keys, width - 1 + longest + seen.sinks)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits_for(tiles: int, keys: int, multiprocessors: int) -> int:
    """Splits that fill the GPU best: of those within 5 % of the best filled last wave the fewest."""
    slots = multiprocessors * _PROGRAMS
    return _best_filled(tiles, slots, max(1, min(keys // _LEAST_KEYS, _MOST_SPLITS, 4 * slots // tiles)))


@functools.lru_cache(maxsize=1024)  # every layer of a model asks the same, thousands of times a second
def _best_filled(tiles: int, slots: int, most: int) -> int:
    filled = [tiles * n / (-(-tiles * n // slots) * slots) for n in range(1, most + 1)]
    enough = 0.95 * max(filled)
    return next(n for n, share in enumerate(filled, 1) if share >= enough)


def attention(
    q,
    k,
    v,
    scale,
    offset,
    out,
    lse,
    geometry: Geometry,
    longest: int,
    splits: int | None = None,
    *,
    sink=None,
    gate=None,
    function: str = "sigmoid",
) -> None:
    """Fills out and lse. `longest`: a bound on the queries of a sequence, for speed only; `splits` forces that many."""
    rows_k, rows_v = Rows(k), Rows(v)
    rows = longest * geometry.group
    kernel = "decode16" if rows <= 16 else "decode32" if rows <= 32 else "decode64"
    keys = visible_keys(geometry, longest)
    constants = dict(HEAD_DIM=geometry.head_dim, BLOCK_D=padded_head_dim(geometry.head_dim), GATE=function)
    after = factor_arguments(scale, geometry), factor_arguments(offset, geometry), sink, gate_arguments(gate)
    results = geometry.batch * geometry.len_q * geometry.heads

    def launch(tile):
        row_blocks = max(1, triton.cdiv(rows, tile.m))
        tiles = row_blocks * geometry.kv_heads * geometry.num_seqs
        parts = splits or splits_for(tiles, keys, _multiprocessors(q.device))
        partial = partial_lse = None
        if parts > 1:
            partial = torch.empty(results * parts, geometry.head_dim, dtype=torch.float32, device=q.device)
            partial_lse = torch.empty(results * parts, dtype=torch.float32, device=q.device)
        _split[(tiles * parts,)](
            q,
            strides(q),
            rows_k.source(tile.n),
            rows_v.source(tile.n),
            out,
            lse,
            partial,
            partial_lse,
            geometry.cu_q,
            geometry.cu_k,
            *after,
            geometry.qk_scale,
            geometry.cap,
            geometry.len_q,
            geometry.len_k,
            row_blocks,
            geometry.kv_heads,
            geometry.group,
            parts,
            *geometry.mask,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            POSITIVE=geometry.positive,
            TMA=uses_tma(q),
            **constants,
            **tile.options,
        )
        if parts > 1:
            _combine[(results,)](
                partial,
                partial_lse,
                out,
                lse,
                geometry.cu_q,
                *after,
                geometry.num_seqs,
                geometry.len_q,
                parts,
                geometry.heads,
                BLOCK_S=16,
                num_warps=4,
                **constants,
            )

    with on_device(q):
        choose(kernel, q, launch)
