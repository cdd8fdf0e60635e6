"""The CPU backend, composed from ATen's own CPU FlashAttention: no kernel and no inner loop of our own.

ATen knows neither scale and offset, nor a gradient into the log-sum-exp, nor queries that see no key; each is added
around it. Packed sequences are run one after the other.
"""

from __future__ import annotations

import math
import typing

import torch
from torch import Tensor

from .. import factors, visibility
from ..visibility import Visibility
from .reference import merge_attention as _merge
from .reference import merge_attention_backward as _merge_backward
from .reference import rope as _rope

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Queries that share one call of ATen, and one additive mask, where ATen's own causal flag does not say the mask.
_CHUNK = 256


class _Piece(typing.NamedTuple):
    """One call of ATen: queries, and the spans of keys that some of them see (two where sinks lie apart)."""

    queries: slice
    keys: list[slice]
    causal: bool = False  # ATen's own flag says the mask
    whole: bool = False  # every pair is seen

    def of(self, t: Tensor) -> Tensor:
        """The keys of a tensor [B, H, S, D]."""
        spans = [t[:, :, keys] for keys in self.keys]
        return spans[0] if len(spans) == 1 else torch.cat(spans, 2)

    def pairs(self, seen: Visibility, first: int) -> Tensor:
        """Which of its pairs count, bool [queries, keys]; `first`: position of query 0."""
        positions = torch.arange(self.queries.start, self.queries.stop) + first
        return seen.pairs(positions, torch.cat([torch.arange(keys.start, keys.stop) for keys in self.keys]))

    def bias(self, seen: Visibility, first: int, dtype: torch.dtype) -> Tensor | None:
        """What ATen adds to the scores, [queries, keys]. A query that sees nothing sees everything here, as ATen has no
        answer for it; the caller discards that row."""
        if self.causal or self.whole:
            return None
        pairs = self.pairs(seen, first)
        hidden = ~pairs & pairs.any(1, keepdim=True)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)

    def looks_like(self, other: _Piece | None, seen: Visibility, first: int) -> bool:
        """Whether another piece has the same bias: it does where only the distance counts, and that is the same. Sinks
        count alike for queries that see them all, in a span of their own."""
        if other is None or seen.chunk:
            return False
        if seen.sinks and any(len(p.keys) != 2 or p.queries.start + first < seen.sinks for p in (self, other)):
            return False
        place = lambda piece: (
            piece.queries.stop - piece.queries.start,
            [keys.stop - keys.start for keys in piece.keys],
            piece.queries.start - piece.keys[-1].start,
        )
        return place(self) == place(other)


def _pieces(sq: int, sk: int, seen: Visibility) -> typing.Iterator[_Piece]:
    """The calls of ATen that make up one attention; `seen` is of heads that see the same.

    Rows of a softmax are independent. So a mask goes in chunks of queries, each with only the keys that one of them
    sees: time goes by the pairs that count, and memory by chunk times keys. Queries that see nothing at the beginning
    and at the end are in no piece.
    """
    positions = torch.arange(sk - sq, sk)
    low, high = seen.limits(positions)
    low, high = low.clamp_(min=0), high.clamp_(max=sk - 1)
    sinks = positions.clamp(-1, min(seen.sinks, sk) - 1) + 1  # so many of them every query sees
    alive = ((low <= high) | (sinks > 0)).nonzero()[:, 0]
    if not len(alive):
        return
    begin, end = int(alive[0]), int(alive[-1]) + 1
    low, high, sinks = low.tolist(), high.tolist(), sinks.tolist()
    full = low[end - 1] == 0 and high[begin] == sk - 1
    square = end - begin == sk and low[end - 1] == 0 and seen.upper == 0 and high[begin] == 0
    if full or square:
        yield _Piece(slice(begin, end), [slice(0, sk)], causal=square, whole=full)
        return
    stop = begin
    while stop < end:
        start, stop = stop, min(stop + _CHUNK, end)
        if seen.upper == 0 and not seen.sinks:  # chunks: each is causal attention of its own
            alone = start
            while alone < end and low[alone] == low[start] and high[alone] - low[start] == alone - start:
                alone += 1
            if alone > stop:
                stop = alone
                yield _Piece(slice(start, stop), [slice(low[start], low[start] + stop - start)], causal=True)
                continue
        keys = slice(low[start], max(low[start], high[stop - 1] + 1))
        spans = [span for span in (slice(0, sinks[stop - 1]), keys) if span.stop > span.start]
        if len(spans) == 2 and spans[0].stop >= keys.start:
            spans = [slice(0, max(spans[0].stop, keys.stop))]
        if spans:
            whole = len(spans) == 1 and low[stop - 1] <= spans[0].start and high[start] >= spans[0].stop - 1
            yield _Piece(slice(start, stop), spans, whole=whole)


def _listed_pieces(sq: int, sk: int, seen: Visibility, visited: Tensor, size: int) -> typing.Iterator[_Piece]:
    """The same for one head under block lists: `visited` bool [blocks of queries, blocks of keys]."""
    (cover,) = seen.cover(sq, sk, size, 1, "cpu")
    for row, columns in enumerate((visited & cover).tolist()):
        spans: list[slice] = []
        for at in (n for n, there in enumerate(columns) if there):
            begin, end = at * size, min((at + 1) * size, sk)
            if spans and spans[-1].stop == begin:
                begin = spans.pop().start
            spans.append(slice(begin, end))
        for start in range(row * size, min((row + 1) * size, sq), _CHUNK) if spans else ():
            yield _Piece(slice(start, min(start + _CHUNK, (row + 1) * size, sq)), spans)


class _Batch:
    """q, k, v of one batch (or one packed sequence) as ATen wants them: [B, H, S, D], of heads that see the same.

    ATen applies its causal flag before the multiplication with the softmax scale, so that 0 and less would give NaN:
    the sign goes into q.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sigma: float, part: _Part):
        seen = self.seen = part.seen
        self.first, self.listed = k.shape[1] - q.shape[1], part.visited is not None
        self.q, self.k, self.v = (t.transpose(1, 2) for t in (q, k, v))
        self.sign, self.sigma = (sigma > 0) - (sigma < 0), abs(sigma) or 1.0
        if self.sign <= 0:
            self.q = self.q * self.sign
        sq, sk = q.shape[1], k.shape[1]
        if self.listed:
            self.pieces = list(_listed_pieces(sq, sk, seen, part.visited, part.size))
            self.dead = torch.ones(sq, dtype=torch.bool)
            for piece in self.pieces:
                self.dead[piece.queries] = ~piece.pairs(seen, self.first).any(1)
            return
        self.pieces = list(_pieces(sq, sk, seen))
        positions = torch.arange(sq) + self.first
        low, high = seen.limits(positions)
        alive = low.clamp(min=0) <= high.clamp(max=sk - 1)
        if seen.sinks and sk:
            alive |= positions >= 0
        self.dead = None if bool(alive.all()) else ~alive  # [Sq]: queries that see no key

    def _calls(self, like: Tensor):
        """Every piece with ATen's keyword arguments, the mask in the dtype of `like`."""
        before = bias = None
        for piece in self.pieces:
            if self.listed or not piece.looks_like(before, self.seen, self.first):
                bias = piece.bias(self.seen, self.first, like.dtype)
                bias = None if bias is None else bias.expand(*like.shape[:2], -1, -1)
            before = piece
            yield piece, dict(is_causal=piece.causal, attn_mask=bias, scale=self.sigma)

    def forward(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Unscaled output [B, H, S, D] and lse [B, H, S], computed in `dtype`; 0 and -inf where a query sees no key."""
        q, k, v = (t if dtype is None else t.to(dtype) for t in (self.q, self.k, self.v))
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.full(q.shape[:3], -math.inf, dtype=_statistics(q))
        if q.numel() == 0:
            return out, lse
        for piece, arguments in self._calls(q):
            rows, kept = q[:, :, piece.queries], piece.of(k)
            if arguments["attn_mask"] is not None and not bool(kept.isfinite().all()):
                found, found_lse = _as_written(rows, kept, piece.of(v), self.sigma, piece.pairs(self.seen, self.first))
            else:
                found, found_lse = _flash(rows, kept, piece.of(v), 0.0, **arguments)
                lost = self._not_numbers(piece, rows, kept, found_lse)
                if lost is not None:
                    found = found.masked_fill(lost[..., None], math.nan)
                    found_lse = found_lse.masked_fill(lost, math.nan)
            out[:, :, piece.queries], lse[:, :, piece.queries] = found, found_lse
        if self.dead is not None:
            out[:, :, self.dead], lse[:, :, self.dead] = 0.0, -math.inf
        return out, lse

    def _not_numbers(self, piece: _Piece, q: Tensor, k: Tensor, lse: Tensor) -> Tensor | None:
        """The queries of a call, bool [B, H, queries], none of whose scores is a number; None where there are none.

        ATen takes such a row for one that sees no key, and answers 0 and 0: a NaN would go on as a zero.
        """
        lost = lse == 0
        if not bool(lost.any()):
            return None
        whole, keys = q.isfinite().all(-1), k.isfinite().all(-1)  # 0 times an infinite key is no number, either
        if not bool(keys.all()):  # of k [B, Hkv, keys]: a query also needs a key that it sees
            seen = keys.float() @ piece.pairs(self.seen, self.first).float().T  # [B, Hkv, queries]
            whole &= (seen > 0).repeat_interleave(q.shape[1] // k.shape[1], 1)
        lost &= ~whole
        return lost if bool(lost.any()) else None

    def backward(self, g: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """grad_q, grad_k, grad_v [B, H, S, D] for g = scale * grad_out and the unscaled output, both in fp32 (fp64 for
        fp64).

        bf16 and fp16 go through ATen as fp32: its sums of grad_k and grad_v over query blocks and heads are in the
        dtype of k.
        """
        q, k, v = (t.to(g.dtype) for t in (self.q, self.k, self.v))
        if q.numel() == 0:
            return q, torch.zeros_like(k), torch.zeros_like(v)
        if self.dead is not None:  # probabilities of exp(S - inf) = 0, and nothing of these rows to multiply them with
            hide = lambda t, value: t.masked_fill(self.dead[:, None] if t.dim() == 4 else self.dead, value)
            g, out, lse = hide(g, 0.0), hide(out, 0.0), hide(lse, math.inf)
            grad_lse = None if grad_lse is None else hide(grad_lse, 0.0)
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # ATen forms delta = sum_d g * out. One more channel, 1 in g and -grad_lse in out, 0 in q, k and v, turns
            # that into delta - grad_lse (the gradient into the log-sum-exp) and leaves every product as it was.
            # Contiguous: ATen reads channels at a stride of 1, and torch may take one channel for "channels last".
            q, k, v = (torch.nn.functional.pad(t, (0, 1)).contiguous() for t in (q, k, v))
            g = torch.nn.functional.pad(g, (0, 1), value=1.0).contiguous()
            out = torch.cat((out, -grad_lse[..., None].to(out.dtype)), -1).contiguous()
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for piece, arguments in self._calls(q):
            g_rows, q_rows, out_rows, lse_rows = (t[:, :, piece.queries] for t in (g, q, out, lse))
            kept = piece.of(k), piece.of(v)
            grads = _flash_backward(g_rows, q_rows, *kept, out_rows, lse_rows, 0.0, **arguments)
            grad_q[:, :, piece.queries] = grads[0]
            for into, grad in ((grad_k, grads[1]), (grad_v, grads[2])):
                parts = grad.split([keys.stop - keys.start for keys in piece.keys], 2)
                for keys, part in zip(piece.keys, parts):
                    into[:, :, keys] += part
        return tuple(t[..., :head_dim] for t in (grad_q if self.sign > 0 else grad_q * self.sign, grad_k, grad_v))


def _as_written(q: Tensor, k: Tensor, v: Tensor, sigma: float, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse by the formula itself, of q [B, H, queries, D] and `pairs` bool [queries, keys].

    For keys that are no numbers: ATen hides a pair by adding -inf to its score, which leaves NaN what it is.
    """
    dtype, group = _statistics(q), q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(group, 1) for t in (k, v))
    scores = (q.to(dtype) @ k.mT * sigma).masked_fill_(~pairs, -math.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp_() @ v).to(q.dtype), lse


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Part(typing.NamedTuple):
    """A batch or packed sequence, and query heads of it that see the same."""

    rows: slice  # of scale and offset
    tokens_q: slice | None  # None: not packed
    tokens_k: slice | None
    heads: slice
    kv_heads: slice
    seen: Visibility
    visited: Tensor | None = None  # with block lists: of the one batch row and head, [blocks of queries, of keys]
    size: int = 0

    def of_q(self, t: Tensor) -> Tensor:
        """The view [B, S, H, D] of q or what has its shape."""
        return (t[self.rows] if self.tokens_q is None else t[self.tokens_q][None])[..., self.heads, :]

    def of_k(self, t: Tensor) -> Tensor:
        return (t[self.rows] if self.tokens_k is None else t[self.tokens_k][None])[..., self.kv_heads, :]

    def of_lse(self, t: Tensor) -> Tensor:
        """The view [B, H, S] of lse [B, H, S] or packed [H, T]."""
        return (t[self.rows] if self.tokens_q is None else t[None, :, self.tokens_q])[:, self.heads]


def _parts(q, k, cu_seqlens, cu_seqlens_k, seen: Visibility, blocks: Tensor | None, size: int) -> list[_Part]:
    places = [(slice(None), None, None)]
    if cu_seqlens is not None:
        places = [
            (slice(n, n + 1), *pair) for n, pair in enumerate(visibility.sequences(q, k, cu_seqlens, cu_seqlens_k))
        ]
    group = max(1, q.shape[-2] // k.shape[-2])
    if blocks is not None:
        blocks = blocks.expand(q.shape[0], q.shape[2], -1, -1)
        return [
            _Part(
                slice(b, b + 1), None, None, slice(h, h + 1), slice(h // group, h // group + 1), own, blocks[b, h], size
            )
            for b in range(q.shape[0])
            for heads, own in seen.by_heads(q.shape[2])
            for h in range(heads.start, heads.stop)
        ]
    kv = lambda heads: slice(heads.start // group, -(-heads.stop // group))
    return [_Part(*place, heads, kv(heads), own) for place in places for heads, own in seen.by_heads(q.shape[-2])]


def _rows(factor: Tensor | None, part: _Part, q: Tensor) -> Tensor | None:
    """The factor of a part as [B or 1, H, 1, D or 1], to multiply [B, H, S, D]."""
    if factor is None:
        return None
    view = factors.full_view(factor, *q.shape[-2:])[:, part.heads]
    return (view[part.rows] if view.shape[0] > 1 else view)[:, :, None]


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
    mask=None,
    blocks=None,
    block_size=128,
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    deterministic=False,
):
    """Forward of docs/ops.md on the CPU; fp16, bf16, fp32, fp64."""
    sigma = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    seen = Visibility.of(causal, window, mask)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=_statistics(q))
    for part in _parts(q, k, cu_seqlens, cu_seqlens_k, seen, blocks, block_size):
        o, l = _Batch(part.of_q(q), part.of_k(k), part.of_k(v), sigma, part).forward()
        s, t = _rows(scale, part, q), _rows(offset, part, q)
        o = o if s is None else o * s
        part.of_q(out).transpose(1, 2).copy_(o if t is None else o + t)
        part.of_lse(lse).copy_(l)
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
    mask=None,
    blocks=None,
    block_size=128,
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    deterministic=False,
):
    """Backward of docs/ops.md on the CPU. ATen wants the unscaled output; see `_unscaled` for where it comes from."""
    heads, head_dim = q.shape[-2:]
    sigma = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    parts = _parts(q, k, cu_seqlens, cu_seqlens_k, Visibility.of(causal, window, mask), blocks, block_size)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    statistics = _statistics(q)
    summed = statistics if blocks is not None else q.dtype  # heads that share a key/value head are separate parts then
    dq, dk, dv = (torch.zeros(t.shape, dtype=summed) for t in (q, k, v))
    dscale = torch.zeros(count, heads, head_dim, dtype=statistics)
    doffset = torch.zeros(count, heads, head_dim, dtype=statistics)
    for part in parts:
        batch = _Batch(part.of_q(q), part.of_k(k), part.of_k(v), sigma, part)
        g = part.of_q(grad_out).transpose(1, 2)
        if needs[4]:
            doffset[part.rows, part.heads] = g.sum(2, dtype=statistics)
        g = g.to(statistics)
        s = _rows(scale, part, q)
        o = _unscaled(part.of_q(out).transpose(1, 2), s, offset)
        o, l = batch.forward(statistics) if o is None else (o, part.of_lse(lse))
        if needs[3]:
            dscale[part.rows, part.heads] = (
                g * o if batch.dead is None else (g * o).masked_fill(batch.dead[:, None], 0)
            ).sum(2)
        if not any(needs[:3]):
            continue
        dl = None if grad_lse is None else part.of_lse(grad_lse)
        grads = batch.backward(g if s is None else g * s, o, l, dl)
        for into, grad in zip((part.of_q(dq), part.of_k(dk), part.of_k(dv)), grads):
            into += grad.transpose(1, 2)
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    if cos is not None:
        dq, dk = rope(dq, dk, cos, sin, positions, positions_k, interleaved=interleaved, inverse=True)
    found = [
        dq,
        dk,
        dv,
        factors.reduce_to(dscale, scale) if needs[3] else None,
        factors.reduce_to(doffset, offset) if needs[4] else None,
    ]
    found = [
        t if want else q.new_empty(0, dtype=statistics if n > 2 else q.dtype)
        for n, (want, t) in enumerate(zip(needs, found))
    ]
    return (*found, q.new_empty(0, dtype=statistics), q.new_empty(0))  # neither sink nor gate (dispatch.TERMS)


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
