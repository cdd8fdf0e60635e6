"""Rotary position embedding of q and k in one launch, and its inverse in place for the gradients.

One program turns a block of tokens of a few heads, so cos and sin are read once for all of them. Arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl

from .host import on_device, strides

_HEADS = 8  # heads a program turns


@triton.jit
def _angles(
    cos_ptr,
    sin_ptr,
    at_ptr,
    at_b,
    table_b,
    table_s,
    table_d,
    table_length,
    batch,
    tokens,
    inside,
    first,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    GATHERED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """cos and sin [tokens, BLOCK_HALF] in fp32. A position outside the table gives NaN and no read: a kernel cannot
    raise."""
    c = tl.arange(0, BLOCK_HALF)
    if GATHERED:
        place = tokens.to(tl.int64)
    elif at_ptr is not None:
        place = tl.load(at_ptr + batch * at_b + tokens, mask=inside, other=0).to(tl.int64)
    else:
        place = tokens.to(tl.int64) + first
    where = batch.to(tl.int64) * table_b + place[:, None] * table_s + c[None, :] * table_d
    valid = (inside & (place >= 0) & (place < table_length))[:, None] & (c < HALF)[None, :]
    cos = tl.load(cos_ptr + where, mask=valid, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + where, mask=valid, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    x_b,
    x_s,
    x_h,
    y_b,
    y_s,
    y_h,
    batch,
    tokens,
    inside,
    head,
    heads,
    cos,
    sin,
    IN_PLACE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turns HEADS heads from `head` on."""
    c = tl.arange(0, BLOCK_HALF)
    for _ in tl.range(0, HEADS):
        # Compared as a vector: Triton 3.9's interpreter takes no mask made of a tensor and a scalar condition.
        there = inside & (tl.zeros_like(tokens) + head < heads)
        valid = there[:, None] & (c < HALF)[None, :]
        x = x_ptr + batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + (tokens.to(tl.int64) * x_s)[:, None]
        y = y_ptr + batch.to(tl.int64) * y_b + head.to(tl.int64) * y_h + (tokens.to(tl.int64) * y_s)[:, None]
        if INTERLEAVED:  # neighbours: load both together, then take them apart
            both = tl.arange(0, 2 * BLOCK_HALF)
            keep = there[:, None] & (both < 2 * HALF)[None, :]
            pair = tl.load(x + both[None, :], mask=keep, other=0.0).to(tl.float32)
            a, b = tl.split(pair.reshape(tokens.shape[0], BLOCK_HALF, 2))
            turned = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(tokens.shape[0], 2 * BLOCK_HALF)
            tl.store(y + both[None, :], turned.to(y_ptr.dtype.element_ty), mask=keep)
        else:
            a = tl.load(x + c[None, :], mask=valid, other=0.0).to(tl.float32)
            b = tl.load(x + HALF + c[None, :], mask=valid, other=0.0).to(tl.float32)
            tl.store(y + c[None, :], (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=valid)
            tl.store(y + HALF + c[None, :], (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=valid)
        if not IN_PLACE and 2 * HALF < HEAD_DIM:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            keep = there[:, None] & (rest < HEAD_DIM)[None, :]
            tl.store(y + rest[None, :], tl.load(x + rest[None, :], mask=keep, other=0.0), mask=keep)
        head += 1


@triton.jit(do_not_specialize=["len_q", "len_k", "first_q", "tiles", "q_at_b", "k_at_b", "table_b", "table_length"])
def _rope(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    q_at_ptr,
    k_at_ptr,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    q_out_b,
    q_out_s,
    q_out_h,
    k_out_b,
    k_out_s,
    k_out_h,
    q_at_b,
    k_at_b,
    table_b,
    table_s,
    table_d,
    table_length,
    len_q,
    len_k,
    first_q,
    tiles,
    q_heads,
    k_heads,
    IN_PLACE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    GATHERED: tl.constexpr,
):
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    parts_q = tl.cdiv(q_heads, HEADS)
    parts = parts_q + tl.cdiv(k_heads, HEADS)
    part = (pid // tiles) % parts
    batch = pid // (tiles * parts)
    if part < parts_q:
        inside = tokens < len_q
        cos, sin = _angles(
            cos_ptr,
            sin_ptr,
            q_at_ptr,
            q_at_b,
            table_b,
            table_s,
            table_d,
            table_length,
            batch,
            tokens,
            inside,
            first_q,
            HALF,
            BLOCK_HALF,
            GATHERED,
            INVERSE,
        )
        _turn(
            q_ptr,
            q_out_ptr,
            q_b,
            q_s,
            q_h,
            q_out_b,
            q_out_s,
            q_out_h,
            batch,
            tokens,
            inside,
            part * HEADS,
            q_heads,
            cos,
            sin,
            IN_PLACE,
            HALF,
            BLOCK_HALF,
            HEAD_DIM,
            BLOCK_REST,
            INTERLEAVED,
            HEADS,
        )
    else:
        inside = tokens < len_k
        cos, sin = _angles(
            cos_ptr,
            sin_ptr,
            k_at_ptr,
            k_at_b,
            table_b,
            table_s,
            table_d,
            table_length,
            batch,
            tokens,
            inside,
            0,
            HALF,
            BLOCK_HALF,
            GATHERED,
            INVERSE,
        )
        _turn(
            k_ptr,
            k_out_ptr,
            k_b,
            k_s,
            k_h,
            k_out_b,
            k_out_s,
            k_out_h,
            batch,
            tokens,
            inside,
            (part - parts_q) * HEADS,
            k_heads,
            cos,
            sin,
            IN_PLACE,
            HALF,
            BLOCK_HALF,
            HEAD_DIM,
            BLOCK_REST,
            INTERLEAVED,
            HEADS,
        )


def _launch(q, k, q_out, k_out, len_q, len_k, cos, sin, positions, positions_k, interleaved, inverse, in_place):
    """q or k may be None; both, where given, are [.., S, H, D] with a last stride of 1. cos and sin share their
    strides."""
    positions_k = positions if positions_k is None else positions_k
    given = q if q is not None else k
    batch = given.shape[0] if given.dim() == 4 else 1
    head_dim, half = given.shape[-1], cos.shape[-1]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    gathered = cos.dim() == 3
    tables = (cos.stride(0) if gathered and cos.shape[0] > 1 else 0, cos.stride(-2), cos.stride(-1))

    def places(at):
        if at is None or gathered:
            return None, 0
        at = at.contiguous()
        return at, at.shape[1] if at.dim() == 2 and at.shape[0] > 1 else 0

    (at_q, at_q_b), (at_k, at_k_b) = places(positions), places(positions_k)
    block_half = triton.next_power_of_2(half)
    block_t = max(4, 1024 // block_half)
    tiles = triton.cdiv(max(len_q if q is not None else 0, len_k if k is not None else 0), block_t)
    heads = [0 if x is None else x.shape[-2] for x in (q, k)]
    programs = tiles * sum(triton.cdiv(n, _HEADS) for n in heads) * batch
    if programs == 0:
        return
    # A tensor that is not there has no heads, so its branch is never taken; the compiler wants a pointer in it all the
    # same.
    q, q_out, k, k_out = (
        (k, k_out, k, k_out) if q is None else (q, q_out, q, q_out) if k is None else (q, q_out, k, k_out)
    )
    with on_device(given):
        _rope[(programs,)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            at_q,
            at_k,
            *strides(q),
            *strides(k),
            *strides(q_out),
            *strides(k_out),
            at_q_b,
            at_k_b,
            *tables,
            cos.shape[-2],
            len_q,
            len_k,
            max(0, len_k - len_q),
            tiles,
            *heads,
            IN_PLACE=in_place,
            HALF=half,
            BLOCK_HALF=block_half,
            HEAD_DIM=head_dim,
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            BLOCK_T=block_t,
            HEADS=_HEADS,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            GATHERED=gathered,
            num_warps=4,
        )


def rope(q, k, cos, sin, positions=None, positions_k=None, *, interleaved=False, inverse=False):
    """seal::rope (docs/ops.md)."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, q_out, k_out, q.shape[-3], k.shape[-3], cos, sin, positions, positions_k, interleaved, inverse, False)
    return q_out, k_out


def rotate_in_place(grad_q, grad_k, len_q, len_k, cos, sin, positions, positions_k, interleaved):
    """Inverse rotation of the gradients with respect to rotated q and k; either may be None."""
    _launch(grad_q, grad_k, grad_q, grad_k, len_q, len_k, cos, sin, positions, positions_k, interleaved, True, True)
