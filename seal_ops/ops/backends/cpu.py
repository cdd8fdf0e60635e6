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
from .reference import rope as _rope

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Batch:
    """q, k, v of one batch (or one packed sequence) as ATen wants them: [B, H, S, D], without the leading queries that
    see no key; with the mask as ATen's own causal flag where that says the same, else as an additive matrix."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sigma: float, left: int, right: int):
        self.sq, self.sk = q.shape[1], k.shape[1]
        self.empty = mask.empty_rows(self.sq, self.sk, right)
        self.q, self.k, self.v = q[:, self.empty:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self.sigma, self.causal, self.bias = sigma, False, None
        sq = self.sq - self.empty
        left = -1 if left >= self.sk - 1 else left
        if left < 0 and right == 0 and sq == self.sk:
            self.causal = True
        elif left >= 0 or (right >= 0 and right < sq - 1):
            seen = mask.allowed(sq, self.sk, left, right)
            self.bias = torch.zeros(sq, self.sk, dtype=q.dtype).masked_fill_(~seen, -math.inf)

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.expand(self.q.shape[0], self.q.shape[1], -1, -1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Unscaled output [B, H, S, D] and lse [B, H, S] of the queries that see a key."""
        if self.q.numel() == 0:
            return self.q, self.q.new_empty(self.q.shape[:3], dtype=_statistics(self.q))
        return _flash(self.q, self.k, self.v, 0.0, self.causal, attn_mask=self._bias(), scale=self.sigma)

    def backward(self, g: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """grad_q, grad_k, grad_v [B, H, S, D] for g = scale * grad_out and the unscaled output."""
        if self.q.numel() == 0:
            return self.q, torch.zeros_like(self.k), torch.zeros_like(self.v)
        q, k, v, head_dim = self.q, self.k, self.v, self.q.shape[-1]
        if grad_lse is not None:
            # ATen forms delta = sum_d g * out. One more channel, 1 in g and -grad_lse in out, 0 in q, k and v, turns that
            # into delta - grad_lse (the gradient into the log-sum-exp) and leaves every product as it was.
            q, k, v = (torch.nn.functional.pad(t, (0, 1)) for t in (q, k, v))
            g = torch.nn.functional.pad(g, (0, 1), value=1.0)
            out = torch.cat((out, -grad_lse[..., None].to(out.dtype)), -1)
        grads = _flash_backward(g, q, k, v, out, lse, 0.0, self.causal, attn_mask=self._bias(), scale=self.sigma)
        return tuple(t[..., :head_dim] for t in grads)


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _batches(q, k, cu_seqlens, cu_seqlens_k):
    """(rows of the scale, index into q, index into k); an index yields [B, S, H, D]."""
    if cu_seqlens is None:
        return [(slice(None), lambda t: t, lambda t: t)]
    return [(slice(n, n + 1), lambda t, s=rq: t[s][None], lambda t, s=rk: t[s][None])
            for n, (rq, rk) in enumerate(mask.sequences(q, k, cu_seqlens, cu_seqlens_k))]


def _rows(factor: Tensor | None, rows: slice, q: Tensor) -> Tensor | None:
    """The factor of these batch rows as [B or 1, Hq, 1, D or 1], to multiply [B, H, S, D]."""
    if factor is None:
        return None
    view = factors.full_view(factor, *q.shape[-2:])
    return (view[rows] if view.shape[0] > 1 else view)[:, :, None]



def _unscaled(out: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor | None:
    """The attention output before scale and offset, or None where it has to be computed once more.

    Division gives it back to within its own rounding while no factor is near 0 (grad_scale has to be exact there) and none
    so large or small that `out` may have over- or underflowed; an offset may have swallowed it.
    """
    if offset is not None:
        return None
    if scale is None:
        return out
    size = scale.abs()
    return (out / scale).to(out.dtype) if bool(((size > 1e-2) & (size < 1e2)).all()) else None


def attention(q, k, v, scale=None, offset=None, *, softmax_scale=None, causal=True, window=None, cu_seqlens=None,
              cu_seqlens_k=None, max_seqlen=None, max_seqlen_k=None, deterministic=False):
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
        into[:, :, batch.empty:] = o if s is None else (o * s).to(o.dtype)
        if t is not None:
            into += t
        lse_of(pick_q)[:, :, batch.empty:] = l
    return out, lse


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, scale=None, offset=None, *, needs=(True,) * 5, cos=None,
                       sin=None, positions=None, positions_k=None, interleaved=False, softmax_scale=None, causal=True,
                       window=None, cu_seqlens=None, cu_seqlens_k=None, max_seqlen=None, max_seqlen_k=None,
                       deterministic=False):
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
        g = g[:, :, batch.empty:]
        s = _rows(scale, rows, q)
        o = _unscaled(pick_q(out).transpose(1, 2)[:, :, batch.empty:], s, offset)
        if o is None:
            o, l = batch.forward()
        else:
            l = lse if cu_seqlens is None else pick_q(lse.transpose(0, 1)).transpose(1, 2)
            l = l[:, :, batch.empty:]
        if needs[3]:
            dscale[rows] = (g.to(statistics) * o).sum(2)
        if not any(needs[:3]):
            continue
        dl = grad_lse
        if dl is not None:
            dl = dl if cu_seqlens is None else pick_q(dl.transpose(0, 1)).transpose(1, 2)
            dl = dl[:, :, batch.empty:]
        grads = batch.backward(g if s is None else (g * s).to(g.dtype), o, l, dl)
        pick_q(dq).transpose(1, 2)[:, :, batch.empty:] = grads[0]
        pick_k(dk).copy_(grads[1].transpose(1, 2))
        pick_k(dv).copy_(grads[2].transpose(1, 2))
    if cos is not None:
        dq, dk = rope(dq, dk, cos, sin, positions, positions_k, interleaved=interleaved, inverse=True)
    found = [dq, dk, dv, factors.reduce_to(dscale, scale) if needs[3] else None,
             factors.reduce_to(doffset, offset) if needs[4] else None]
    return tuple(t if want else q.new_empty(0, dtype=statistics if n > 2 else q.dtype)
                 for n, (want, t) in enumerate(zip(needs, found)))


def rope(q, k, cos, sin, positions=None, positions_k=None, *, interleaved=False, inverse=False):
    """Rotary embedding in fp32 (fp64 for fp64), rounded once."""
    return _rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved, inverse=inverse, dtype=_statistics(q))


def rope_attention(q, k, v, cos, sin, positions=None, positions_k=None, scale=None, offset=None, *, interleaved=False,
                   **arguments):
    """rope, then attention."""
    q, k = rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved)
    return (*attention(q, k, v, scale, offset, **arguments), q, k)
