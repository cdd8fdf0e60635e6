"""Merging attention over parts of the keys: one pass over the outputs, forward and backward.

A program owns a tile of tokens of one head. Sums are in the log-sum-exps' dtype. The backward reads every part twice,
the second time from the caches, so that no merged output has to be kept for it."""

import torch
import triton
import triton.language as tl

from .host import on_device

_BYTES = 16 << 10  # of a tile in the sums' dtype: what a program of four warps holds in registers without spilling


@triton.jit
def _place(tokens, heads, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and masks of a program's tile: into lse [.., H, S], and into out [.., S, H, D]."""
    tiles = tl.cdiv(tokens, BLOCK_S)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = (pid // (tiles * heads)).to(tl.int64)
    s = (pid % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = (((batch * tokens + s) * heads + head) * HEAD_DIM)[:, None] + d[None, :]
    return (batch * heads + head) * tokens + s, s < tokens, at, (s < tokens)[:, None] & (d < HEAD_DIM)[None, :]


@triton.jit
def _log_sum(lses, rows, inside, PARTS: tl.constexpr):
    """The log-sum-exp of all parts, and a finite one for rows that no part sees."""
    top = tl.load(lses[0] + rows, mask=inside, other=float("-inf"))
    for n in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.load(lses[n] + rows, mask=inside, other=float("-inf")))
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros_like(top)
    for n in tl.static_range(PARTS):
        total += tl.exp(tl.load(lses[n] + rows, mask=inside, other=float("-inf")) - finite)
    seen = total > 0
    finite = tl.where(seen, finite + tl.log(tl.where(seen, total, 1.0)), 0.0)
    return tl.where(seen, finite, float("-inf")), finite


@triton.jit
def _sum(outs, lses, rows, inside, at, within, finite, PARTS: tl.constexpr):
    """sum exp(lse_i - lse) out_i; what a part holds in a row that it does not see is not read."""
    acc = tl.zeros(at.shape, finite.dtype)
    for n in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lses[n] + rows, mask=inside, other=float("-inf")) - finite)
        out = tl.load(outs[n] + at, mask=within & (weight > 0)[:, None], other=0.0)
        acc += weight[:, None] * out.to(finite.dtype)
    return acc


@triton.jit
def _merge(
    outs, lses, out_ptr, lse_ptr, tokens, heads,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, inside, at, within = _place(tokens, heads, HEAD_DIM, BLOCK_S, BLOCK_D)
    lse, finite = _log_sum(lses, rows, inside, PARTS)
    acc = _sum(outs, lses, rows, inside, at, within, finite, PARTS)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=within)
    tl.store(lse_ptr + rows, lse, mask=inside)


@triton.jit
def _merge_backward(
    outs, lses, grad_out_ptr, grad_lse_ptr, grad_outs_ptr, grad_lses_ptr, tokens, heads, elements, all_rows,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, inside, at, within = _place(tokens, heads, HEAD_DIM, BLOCK_S, BLOCK_D)
    _, finite = _log_sum(lses, rows, inside, PARTS)
    acc = _sum(outs, lses, rows, inside, at, within, finite, PARTS)
    g = tl.load(grad_out_ptr + at, mask=within, other=0.0).to(finite.dtype)
    into_lse = tl.zeros_like(finite)
    if grad_lse_ptr is not None:
        into_lse = tl.load(grad_lse_ptr + rows, mask=inside, other=0.0)
    for n in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lses[n] + rows, mask=inside, other=float("-inf")) - finite)
        seen = weight > 0
        out = tl.load(outs[n] + at, mask=within & seen[:, None], other=0.0).to(finite.dtype)
        moved = tl.sum(g * (out - acc), 1) + into_lse
        # Selected, not multiplied: a row that the part does not see takes no gradient, NaN included.
        grad = tl.where(seen[:, None], weight[:, None] * g, 0.0)
        tl.store(grad_outs_ptr + n * elements + at, grad.to(grad_outs_ptr.dtype.element_ty), mask=within)
        tl.store(grad_lses_ptr + n * all_rows + rows, tl.where(seen, weight * moved, 0.0), mask=inside)


def _launch(kernel, outs, lses, *arguments):
    *_, tokens, heads, head_dim = outs[0].shape
    block_d = triton.next_power_of_2(head_dim)
    size = lses[0].element_size()
    block_s = max(1, min(128, _BYTES // size // (block_d if size == 4 else 2 * block_d)))
    batch = outs[0].shape[0] if outs[0].dim() == 4 else 1
    outs, lses = (tuple(t.contiguous() for t in parts) for parts in (outs, lses))
    with on_device(outs[0]):
        kernel[(triton.cdiv(tokens, block_s) * heads * batch,)](
            outs, lses, *arguments[:-1], tokens, heads, *arguments[-1],
            PARTS=len(outs), HEAD_DIM=head_dim, BLOCK_S=block_s, BLOCK_D=block_d,
        )  # fmt: skip


def merge_attention(outs, lses):
    """seal::merge_attention (docs/ops.md)."""
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(lses[0].shape, dtype=lses[0].dtype, device=lses[0].device)
    if out.numel():
        _launch(_merge, outs, lses, out, lse, ())
    return out, lse


def merge_attention_backward(grad_out, grad_lse, outs, lses):
    """seal::merge_attention_backward (docs/ops.md)."""
    stacked = lambda t: torch.empty((len(outs), *t.shape), dtype=t.dtype, device=t.device)
    grad_outs, grad_lses = stacked(outs[0]), stacked(lses[0])
    if grad_outs.numel():
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        sizes = outs[0].numel(), lses[0].numel()
        _launch(_merge_backward, outs, lses, grad_out.contiguous(), grad_lse, grad_outs, grad_lses, sizes)
    return grad_outs, grad_lses
