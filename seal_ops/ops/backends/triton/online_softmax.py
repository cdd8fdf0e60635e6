"""The loop over key blocks that the forward and decoding share."""

import triton
import triton.language as tl

from .terms import bent
from .tiling import load_rows, product
from .walk import block_start, loop_range, seen


@triton.jit
def key_loop(
    acc,
    total,
    top,
    q,
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
    POSITIVE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Online softmax over the full key blocks, or over the masked ones; `rows` are the queries of the rows of q. With
    a soft cap POSITIVE is false."""
    len_k = bounds[1]
    lower, upper = loop_range(blocks, MASKED)
    for i in tl.range(lower, upper):
        first = block_start(i, blocks, BLOCK_N, MASKED)
        k = load_rows(k_source, batch, kv_head, start, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        s = product(q, k.T, None)
        if cap is not None:
            s = bent(s * qk_scale, q.dtype == tl.float32) * cap
        elif not POSITIVE:  # the maximum of sigma * s is not sigma * the maximum
            s *= qk_scale
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            s = tl.where(seen(rows[:, None], keys[None, :], bounds), s, float("-inf"))
        if POSITIVE:
            new_top = tl.maximum(top, tl.max(s, 1) * qk_scale)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
        base = new_top
        if MASKED:  # a row that has seen no key yet
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        if POSITIVE:
            p = tl.exp2(s * qk_scale - base[:, None])
        else:
            p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v = load_rows(v_source, batch, kv_head, start, first, len_k, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, MASKED)
        if MASKED and PACKED and TMA:  # rows of the next sequence may hold NaN, and 0 * NaN would reach us
            v = tl.where(keys[:, None] < len_k, v, 0.0)
        acc = product(p.to(v.dtype), v, acc)
        top = new_top
    return acc, total, top
