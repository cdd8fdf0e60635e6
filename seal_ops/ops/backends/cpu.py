"""The CPU backend, composed from ATen's own CPU FlashAttention: no kernel and no inner loop of our own.

ATen knows neither scale and offset, nor a gradient into the log-sum-exp, nor queries that see no key; each is added
around it. Packed sequences are run one after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import factors
from .. import masks as mask
from .reference import merge_attention as _merge
from .reference import merge_attention_backward as _merge_backward
from .reference import rope as _rope

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Queries that share one call of ATen, and one additive mask, where ATen's own causal flag does not say the mask.
_CHUNK = 256


def _pieces(sq: int, sk: int, left: int, right: int):
    """(queries, keys, causal, mask) of the calls of ATen that make up one attention: mask is None or (rows, columns,
    first position).

    Rows of a softmax are independent. So a window or a rectangular causal mask goes in chunks of queries, each with
    only the keys that one of them sees: time goes by the pairs that count, and memory by chunk times keys.
    """
    left = -1 if left >= sk - 1 else left
    right = -1 if right >= sq - 1 else right
    square = left < 0 and right == 0 and sq == sk
    if square or (left < 0 and right < 0):
        yield slice(0, sq), slice(0, sk), square, None
        return
    for start in range(0, sq, _CHUNK):
        stop = min(start + _CHUNK, sq)
        first, last = start + sk - sq, stop - 1 + sk - sq  # positions of the chunk's queries
        keys = slice(max(0, first - left) if left >= 0 else 0, min(sk, last + right + 1) if right >= 0 else sk)
        whole = (left < 0 or last - left <= keys.start) and (right < 0 or first + right >= keys.stop - 1)
        seen = None if whole else (stop - start, keys.stop - keys.start, first - keys.start)
        yield slice(start, stop), keys, False, seen


class _Batch:
    """q, k, v of one batch (or one packed sequence) as ATen wants them: [B, H, S, D], without the leading queries that
    see no key.

    ATen applies its causal flag before the multiplication with the softmax scale, so that 0 and less would give NaN:
    the sign goes into q.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sigma: float, left: int, right: int):
        self.sq, self.sk = q.shape[1], k.shape[1]
        self.empty = mask.empty_rows(self.sq, self.sk, right)
        self.q, self.k, self.v = q[:, self.empty :].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self.sign, self.sigma = (sigma > 0) - (sigma < 0), abs(sigma) or 1.0
        if self.sign <= 0:
            self.q = self.q * self.sign
        self.left, self.right = left, right

    def _calls(self, like: Tensor):
        """(queries, keys, keyword arguments of ATen) of every piece, the mask in the dtype of `like`."""
        before = bias = None
        for queries, keys, causal, seen in _pieces(self.sq - self.empty, self.sk, self.left, self.right):
            if seen != before:  # the same for every chunk inside a window
                before, bias = seen, None
                if seen is not None:
                    rows, columns, first = seen
                    hidden = ~mask.allowed(rows, columns, self.left, self.right, first=first)
                    bias = torch.zeros(rows, columns, dtype=like.dtype).masked_fill_(hidden, -math.inf)
                    bias = bias.expand(*like.shape[:2], -1, -1)
            yield queries, keys, dict(is_causal=causal, attn_mask=bias, scale=self.sigma)

    def forward(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Unscaled output [B, H, S, D] and lse [B, H, S] of the queries that see a key, computed in `dtype`."""
        q, k, v = (t if dtype is None else t.to(dtype) for t in (self.q, self.k, self.v))
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=_statistics(q))
        if q.numel() == 0:
            return out, lse
        for queries, keys, arguments in self._calls(q):
            found = _flash(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, **arguments)
            out[:, :, queries], lse[:, :, queries] = found
        return out, lse

    def backward(self, g: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """grad_q, grad_k, grad_v [B, H, S, D] for g = scale * grad_out and the unscaled output, both in fp32 (fp64 for
        fp64).

        bf16 and fp16 go through ATen as fp32: its sums of grad_k and grad_v over query blocks and heads are in the
        dtype of k.
        """
        q, k, v = (t.to(g.dtype) for t in (self.q, self.k, self.v))
        if q.numel() == 0:
            return q, torch.zeros_like(k), torch.zeros_like(v)
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # ATen forms delta = sum_d g * out. One more channel, 1 in g and -grad_lse in out, 0 in q, k and v, turns
            # that into delta - grad_lse (the gradient into the log-sum-exp) and leaves every product as it was.
            # Contiguous: ATen reads channels at a stride of 1, and torch may take one channel for "channels last".
            q, k, v = (torch.nn.functional.pad(t, (0, 1)).contiguous() for t in (q, k, v))
            g = torch.nn.functional.pad(g, (0, 1), value=1.0).contiguous()
            out = torch.cat((out, -grad_lse[..., None].to(out.dtype)), -1).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, arguments in self._calls(q):
            g_rows, q_rows, out_rows, lse_rows = (t[:, :, queries] for t in (g, q, out, lse))
            kept = k[:, :, keys], v[:, :, keys]
            grads = _flash_backward(g_rows, q_rows, *kept, out_rows, lse_rows, 0.0, **arguments)
            grad_q[:, :, queries] = grads[0]
            grad_k[:, :, keys] += grads[1]
            grad_v[:, :, keys] += grads[2]
        return tuple(t[..., :head_dim] for t in (grad_q if self.sign > 0 else grad_q * self.sign, grad_k, grad_v))


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _batches(q, k, cu_seqlens, cu_seqlens_k):
    """(rows of the scale, index into q, index into k); an index yields [B, S, H, D]."""
    if cu_seqlens is None:
        return [(slice(None), lambda t: t, lambda t: t)]
    return [
        (slice(n, n + 1), lambda t, s=rq: t[s][None], lambda t, s=rk: t[s][None])
        for n, (rq, rk) in enumerate(mask.sequences(q, k, cu_seqlens, cu_seqlens_k))
    ]


def _rows(factor: Tensor | None, rows: slice, q: Tensor) -> Tensor | None:
    """The factor of these batch rows as [B or 1, Hq, 1, D or 1], to multiply [B, H, S, D]."""
    if factor is None:
        return None
    view = factors.full_view(factor, *q.shape[-2:])
    return (view[rows] if view.shape[0] > 1 else view)[:, :, None]


def _unscaled(out: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor | None:
    """The attention output before scale and offset, in fp32 (fp64), or None where it has to be computed once more.

    Division gives it back to within its own rounding while no factor is near 0 (grad_scale has to be exact there) and
    none so large or small that `out` may have over- or underflowed; an offset may have swallowed it.
    """
    if offset is not None:
        return None
    if scale is None:
        return out.to(_statistics(out))
    size = scale.abs()
    return out / scale if bool(((size > 1e-2) & (size < 1e2)).all()) else None


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
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    deterministic=False,
):
    """Forward of docs/ops.md on the CPU; fp16, bf16, fp32, fp64."""
    sigma = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    left, right = mask.bounds(causal, window)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -math.inf, dtype=_statistics(q))
    lse_of = (lambda pick: lse) if cu_seqlens is None else (lambda pick: pick(lse.transpose(0, 1)).transpose(1, 2))
    for rows, pick_q, pick_k in _batches(q, k, cu_seqlens, cu_seqlens_k):
        batch = _Batch(pick_q(q), pick_k(k), pick_k(v), sigma, left, right)
        o, l = batch.forward()
        s, t = _rows(scale, rows, q), _rows(offset, rows, q)
        into = pick_q(out).transpose(1, 2)
        into[:, :, batch.empty :] = o if s is None else (o * s).to(o.dtype)
        if t is not None:
            into += t
        lse_of(pick_q)[:, :, batch.empty :] = l
    return out, lse


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
    needs=(True,) * 5,
    cos=None,
    sin=None,
    positions=None,
    positions_k=None,
    interleaved=False,
    softmax_scale=None,
    causal=True,
    window=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    deterministic=False,
):
    """Backward of docs/ops.md on the CPU. ATen wants the unscaled output; see `_unscaled` for where it comes from."""
    heads, head_dim = q.shape[-2:]
    sigma = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    left, right = mask.bounds(causal, window)
    batches = _batches(q, k, cu_seqlens, cu_seqlens_k)
    count = q.shape[0] if cu_seqlens is None else len(batches)
    statistics = _statistics(q)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    dscale = torch.zeros(count, heads, head_dim, dtype=statistics)
    doffset = torch.zeros(count, heads, head_dim, dtype=statistics)
    for rows, pick_q, pick_k in batches:
        batch = _Batch(pick_q(q), pick_k(k), pick_k(v), sigma, left, right)
        g = pick_q(grad_out).transpose(1, 2)
        if needs[4]:
            doffset[rows] = g.sum(2, dtype=statistics)
        g = g[:, :, batch.empty :].to(statistics)
        s = _rows(scale, rows, q)
        o = _unscaled(pick_q(out).transpose(1, 2)[:, :, batch.empty :], s, offset)
        if o is None:
            o, l = batch.forward(statistics)
        else:
            l = lse if cu_seqlens is None else pick_q(lse.transpose(0, 1)).transpose(1, 2)
            l = l[:, :, batch.empty :]
        if needs[3]:
            dscale[rows] = (g * o).sum(2)
        if not any(needs[:3]):
            continue
        dl = grad_lse
        if dl is not None:
            dl = dl if cu_seqlens is None else pick_q(dl.transpose(0, 1)).transpose(1, 2)
            dl = dl[:, :, batch.empty :]
        grads = batch.backward(g if s is None else g * s, o, l, dl)
        pick_q(dq).transpose(1, 2)[:, :, batch.empty :] = grads[0]
        pick_k(dk).copy_(grads[1].transpose(1, 2))
        pick_k(dv).copy_(grads[2].transpose(1, 2))
    if cos is not None:
        dq, dk = rope(dq, dk, cos, sin, positions, positions_k, interleaved=interleaved, inverse=True)
    found = [
        dq,
        dk,
        dv,
        factors.reduce_to(dscale, scale) if needs[3] else None,
        factors.reduce_to(doffset, offset) if needs[4] else None,
    ]
    return tuple(
        t if want else q.new_empty(0, dtype=statistics if n > 2 else q.dtype)
        for n, (want, t) in enumerate(zip(needs, found))
    )


def rope(q, k, cos, sin, positions=None, positions_k=None, *, interleaved=False, inverse=False):
    """Rotary embedding in fp32 (fp64 for fp64), rounded once."""
    return _rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved, inverse=inverse, dtype=_statistics(q))


def rope_attention(
    q, k, v, cos, sin, positions=None, positions_k=None, scale=None, offset=None, *, interleaved=False, **arguments
):
    """rope, then attention."""
    q, k = rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved)
    return (*attention(q, k, v, scale, offset, **arguments), q, k)


def merge_attention(outs, lses):
    """The oracle's formula in fp32 (fp64 for fp64)."""
    return _merge(outs, lses, dtype=lses[0].dtype)


def merge_attention_backward(grad_out, grad_lse, outs, lses):
    """The oracle's formula in fp32 (fp64 for fp64)."""
    return _merge_backward(grad_out, grad_lse, outs, lses, dtype=lses[0].dtype)
