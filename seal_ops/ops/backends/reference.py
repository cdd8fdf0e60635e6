"""The oracle: every op written once, to be read. Slow, whole score matrices, computed in fp64 whatever comes in.

It follows the formulae of docs/ops.md ("Mathematics") literally, forward and backward, and honours every argument of
the contract; all backends are tested against it. Results come back in the dtypes of the contract.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import factors, visibility
from ..visibility import Visibility

_F64 = torch.float64


def _rows(q, k, cu_seqlens, cu_seqlens_k):
    """Index pairs into q and k, one a batch row or packed sequence; each picks [S, H, D]."""
    if cu_seqlens is None:
        return [(b, b) for b in range(q.shape[0])]
    return visibility.sequences(q, k, cu_seqlens, cu_seqlens_k)


def _lse_row(lse: Tensor, index) -> Tensor:
    """[Hq, Sq] of one row; a view into lse [B, Hq, Sq] or packed [Hq, Tq]."""
    return lse[:, index] if isinstance(index, slice) else lse[index]


def _softmax(
    q: Tensor, k: Tensor, sigma: float, seen: Tensor, sink: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P [Hq, Sq, Sk] and lse [Hq, Sq] of one row; q [Sq, Hq, D], k [Sk, Hkv, D], seen bool [Hq or 1,
    Sq, Sk], sink [Hq]. Empty rows: P = 0, lse = -inf, or the sink. Last: tanh of the soft cap."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q.to(_F64), k.to(_F64).repeat_interleave(group, 1)) * sigma
    bent = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores = softcap * bent
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(_F64)[:, None])
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), lse, bent


def _gated(gate: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """f(gate) and f'(gate)."""
    gate = gate.to(_F64)
    share = torch.sigmoid(gate)
    return (share, share * (1 - share)) if function == "sigmoid" else (torch.nn.functional.softplus(gate), share)


def seen_pairs(seen: Visibility, blocks: Tensor | None, size: int):
    """A function of one row's q [Sq, Hq, D] and k, and the row's number: which pairs count, bool [Hq or 1, Sq, Sk]."""

    def pairs(q: Tensor, k: Tensor, row: int) -> Tensor:
        found = seen.allowed(q.shape[0], k.shape[0], q.shape[1], q.device)
        if blocks is None:
            return found
        each = blocks[row if blocks.shape[0] > 1 else 0].repeat_interleave(size, 1).repeat_interleave(size, 2)
        return found & each[:, : q.shape[0], : k.shape[0]]

    return pairs


def _sigma(softmax_scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale


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
    """out = f(gate) * scale * softmax(sigma q k^T + mask) v + offset, and the log-sum-exp."""
    heads, head_dim = q.shape[-2:]
    pairs = seen_pairs(Visibility.of(causal, window, mask), blocks, block_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], heads, q.shape[-3]), dtype=_statistics(q), device=q.device)
    for n, (rq, rk) in enumerate(_rows(q, k, cu_seqlens, cu_seqlens_k)):
        seen = pairs(q[rq], k[rk], n)
        p, row_lse, _ = _softmax(q[rq], k[rk], _sigma(softmax_scale, head_dim), seen, sink, softcap)
        o = torch.einsum("hij,jhd->ihd", p, v[rk].to(_F64).repeat_interleave(heads // v.shape[-2], 1))
        if scale is not None:
            o = o * factors.row(scale, n, heads, head_dim).to(_F64)
        if gate is not None:
            o = o * _gated(gate[rq], gate_function)[0]
        if offset is not None:
            o = o + factors.row(offset, n, heads, head_dim).to(_F64)
        out[rq] = o.to(out.dtype)
        _lse_row(lse, rq).copy_(row_lse)
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
    """The gradients, from recomputed probabilities: out and lse are not read, so nothing saved can mislead it."""
    heads, head_dim = q.shape[-2:]
    group = heads // k.shape[-2]
    sigma = _sigma(softmax_scale, head_dim)
    pairs = seen_pairs(Visibility.of(causal, window, mask), blocks, block_size)
    rows = _rows(q, k, cu_seqlens, cu_seqlens_k)
    dq, dk, dv = (torch.zeros(t.shape, dtype=_F64, device=t.device) for t in (q, k, v))
    dscale = torch.zeros(len(rows), heads, head_dim, dtype=_F64, device=q.device)
    doffset = torch.zeros_like(dscale)
    dsink = torch.zeros(heads, dtype=_F64, device=q.device)
    dgate = None if gate is None else torch.zeros(gate.shape, dtype=_F64, device=q.device)
    for n, (rq, rk) in enumerate(rows):
        p, row_lse, bent = _softmax(q[rq], k[rk], sigma, pairs(q[rq], k[rk], n), sink, softcap)
        g = grad_out[rq].to(_F64)
        v_row = v[rk].to(_F64).repeat_interleave(group, 1)
        o = torch.einsum("hij,jhd->ihd", p, v_row)
        if gate is not None:
            opened, slope = _gated(gate[rq], gate_function)
            into = g * o if scale is None else g * o * factors.row(scale, n, heads, head_dim).to(_F64)
            dgate[rq] = into * slope if gate.shape[-1] > 1 else into.sum(-1, keepdim=True) * slope
            g = g * opened
        dscale[n], doffset[n] = (g * o).sum(0), g.sum(0)
        if scale is not None:
            g = g * factors.row(scale, n, heads, head_dim).to(_F64)
        dp = torch.einsum("ihd,jhd->hij", g, v_row)
        delta = (g * o).sum(-1).T
        if grad_lse is not None:
            delta = delta - _lse_row(grad_lse, rq).to(_F64).masked_fill(row_lse == -math.inf, 0.0)
        if sink is not None:  # a key without a value, of the probability exp(sink - lse)
            dsink -= (
                torch.exp(sink.to(_F64)[:, None] - row_lse.masked_fill(row_lse == -math.inf, math.inf)) * delta
            ).sum(-1)
        ds = p * (dp - delta[..., None]) * sigma
        if bent is not None:
            ds = ds * (1 - bent.square())
        dq[rq] = torch.einsum("hij,jhd->ihd", ds, k[rk].to(_F64).repeat_interleave(group, 1))
        dk[rk] = _sum_groups(torch.einsum("hij,ihd->jhd", ds, q[rq].to(_F64)), k.shape[-2])
        dv[rk] = _sum_groups(torch.einsum("hij,ihd->jhd", p, g), k.shape[-2])
    if cos is not None:
        dq, dk = rope(dq, dk, cos, sin, positions, positions_k, interleaved=interleaved, inverse=True)
    found = [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None]
    if scale is not None:
        found[3] = factors.reduce_to(dscale, scale).to(scale.dtype)
    if offset is not None:
        found[4] = factors.reduce_to(doffset, offset).to(offset.dtype)
    if sink is not None:
        found[5] = dsink.to(sink.dtype)
    if gate is not None:
        found[6] = dgate.to(gate.dtype)
    wanted = [*needs, *[False] * (7 - len(needs))]
    return tuple(
        t if want and t is not None else q.new_empty(0, dtype=_statistics(q) if 2 < n < 6 else q.dtype)
        for n, (want, t) in enumerate(zip(wanted, found))
    )


def _sum_groups(per_query_head: Tensor, kv_heads: int) -> Tensor:
    return per_query_head.unflatten(1, (kv_heads, per_query_head.shape[1] // kv_heads)).sum(2)


def _statistics(q: Tensor) -> torch.dtype:
    """dtype of lse, grad_scale and grad_offset."""
    return _F64 if q.dtype == _F64 else torch.float32


def angles(table: Tensor, positions: Tensor | None, length: int, first: int, dtype: torch.dtype) -> Tensor:
    """cos or sin of every token, [S, 1, R/2] or [B, S, 1, R/2], from a table [N, R/2] or values per token [B, S,
    R/2]."""
    if table.dim() == 3:
        values = table
    elif positions is None:
        values = table[first : first + length]
    else:
        values = table[positions.long()]
    return values.to(dtype)[..., None, :]


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first R channels of x [..., S, H, D] by angles [..., S, 1, R/2]."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :].to(cos.dtype)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def rope(q, k, cos, sin, positions=None, positions_k=None, *, interleaved=False, inverse=False, dtype=_F64):
    """Rotary embedding of q and k (docs/ops.md); without positions q is the last Sq of the Sk positions."""
    sq, sk = q.shape[-3], k.shape[-3]
    positions_k = positions if positions_k is None else positions_k
    rotated = []
    for x, at, first in ((q, positions, max(0, sk - sq)), (k, positions_k, 0)):
        c, s = (angles(t, at, x.shape[-3], first, dtype) for t in (cos, sin))
        rotated.append(turn(x, c, -s if inverse else s, interleaved))
    return tuple(rotated)


def rope_attention(
    q, k, v, cos, sin, positions=None, positions_k=None, scale=None, offset=None, *, interleaved=False, **arguments
):
    """rope, then attention; the rotated q and k are what a backward needs."""
    q, k = rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved)
    return (*attention(q, k, v, scale, offset, **arguments), q, k)


def merge_attention(outs, lses, *, dtype=_F64):
    """lse = log(sum exp(lse_i)), out = sum exp(lse_i - lse) out_i; a row that no part sees: 0 and -inf."""
    weights, lse = _weights(lses, dtype)
    out = sum(_part(o, w) for o, w in zip(outs, weights))
    return out.to(outs[0].dtype).contiguous(), lse.to(lses[0].dtype).contiguous()


def merge_attention_backward(grad_out, grad_lse, outs, lses, *, dtype=_F64):
    """The gradients of the parts, stacked: w_i g, and w_i (g . (out_i - out) + grad_lse) summed over channels."""
    weights, _ = _weights(lses, dtype)
    out, g = sum(_part(o, w) for o, w in zip(outs, weights)), grad_out.to(dtype)
    grad_lse = 0.0 if grad_lse is None else grad_lse.to(dtype)
    into_outs = [_part(g, w).to(grad_out.dtype) for w in weights]
    into_lses = []
    for o, w in zip(outs, weights):
        moved = (g * (torch.where(w.transpose(-1, -2)[..., None] > 0, o.to(dtype), out) - out)).sum(-1)
        into_lses.append(torch.where(w > 0, w * (moved.transpose(-1, -2) + grad_lse), 0.0).to(lses[0].dtype))
    return torch.stack(into_outs), torch.stack(into_lses)


def _weights(lses, dtype) -> tuple[list[Tensor], Tensor]:
    """exp(lse_i - lse) of every part, and lse; 0 and -inf in a row that no part sees."""
    lses = [t.to(dtype) for t in lses]
    lse = functools.reduce(torch.logaddexp, lses) if len(lses) > 1 else lses[0].clone()  # never an input itself
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return [torch.exp(t - finite) for t in lses], lse


def _part(out: Tensor, weight: Tensor) -> Tensor:
    """weight [.., H, S] times out [.., S, H, D]; 0 where the weight is 0, whatever stands there."""
    weight = weight.transpose(-1, -2)[..., None]
    return torch.where(weight > 0, out.to(weight.dtype) * weight, 0.0)
