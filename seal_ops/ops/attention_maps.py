"""Sums and maxima of the attention probabilities, from q, k and the log-sum-exp, a chunk of queries at a time.

Memory is that of one chunk of rows, never Sq x Sk; time is a product of Q and K^T over the keys that a chunk may see.
Nothing here has a gradient. q is [B, Sq, Hq, D], k [B, Sk, Hkv, D]; `lse` [B, Hq, Sq] is what `attention(...,
return_lse=True)` gave for the same mask (a plain one or `masks.blocks`) and softmax_scale. A query that sees no key
counts as zeros.

Packed sequences, and so the real tokens of padded rows, come as q [T, Hq, D], k and lse [Hq, T] with `cu_seqlens` (and
`cu_seqlens_k` where the keys' lengths differ), which are read on the host; positions, blocks and spans are those of
each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .masks import BlockMask, Mask, causal
from .visibility import Visibility, sequences

_ELEMENTS = 1 << 25  # of a chunk's probabilities, all batch rows and heads together


def _check(q: Tensor, k: Tensor, lse: Tensor, mask: Mask | BlockMask | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError, one sentence, for shapes that do not belong together."""
    packed = cu_seqlens is not None
    for name, t in (("q", q), ("k", k)):
        if t.dim() != (3 if packed else 4):
            expected = "[T, H, D] with cu_seqlens" if packed else "[B, S, H, D] without cu_seqlens"
            raise ValueError(f"seal_ops.attention_maps: {name} must have shape {expected}, got {list(t.shape)}")
    if packed and isinstance(mask, BlockMask):
        raise ValueError("seal_ops.attention_maps: mask must be a plain one with cu_seqlens, got block lists")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"seal_ops.attention_maps: k must have q's head_dim and heads that divide q's {q.shape[-2]}, got "
            f"{list(k.shape)}"
        )
    expected = [*q.shape[:-3], q.shape[-2], q.shape[-3]]
    if list(lse.shape) != expected:
        raise ValueError(f"seal_ops.attention_maps: lse must have shape {expected}, got {list(lse.shape)}")


def _by_sequence(q, k, lse, cu_seqlens, cu_seqlens_k) -> list[tuple[slice, slice, tuple[Tensor, Tensor, Tensor]]]:
    """(its queries, its keys, (q, k, lse) as a batch of one) of each packed sequence."""
    found = []
    for tokens, keys in sequences(q, k, cu_seqlens, cu_seqlens_k):
        found.append((tokens, keys, (q[None, tokens], k[None, keys], lse[None, :, tokens])))
    return found


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask | BlockMask | None, softmax_scale: float | None, multiple: int = 1
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys, their probabilities [B, Hq, queries, keys]) in fp32 (fp64 for fp64); other keys have none. A
    chunk is whole multiples of `multiple` queries but for the last, and its keys begin at one."""
    batch, sq, heads, head_dim = q.shape
    sk, group = k.shape[1], heads // k.shape[2]
    sigma = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    lists = mask if isinstance(mask, BlockMask) else None
    plain = causal() if mask is None else mask if lists is None else lists.mask
    parts = Visibility(*plain.resolve(heads)).by_heads(heads)
    k = k.to(lse.dtype).transpose(1, 2)[:, :, None]
    rows = max(1, _ELEMENTS // max(1, batch * heads * sk) // multiple) * multiple
    for start in range(0, sq, rows):
        queries = slice(start, min(start + rows, sq))
        positions = torch.arange(queries.start, queries.stop, device=q.device) + sk - sq
        keys = _reach(parts, queries.start + sk - sq, queries.stop - 1 + sk - sq, sk, multiple)
        place = torch.arange(keys.start, keys.stop, device=q.device)
        grouped = q[:, queries].to(lse.dtype).transpose(1, 2).unflatten(1, (-1, group))
        scores = (grouped @ k[:, :, :, keys].transpose(-1, -2)).flatten(1, 2).mul_(sigma)
        level = lse[:, :, queries, None]
        p = torch.exp(scores.sub_(level.masked_fill(level == -math.inf, math.inf)))
        for part, own in parts:
            p[:, part].masked_fill_(~own.pairs(positions, place), 0.0)
        if lists is not None:
            row = torch.arange(queries.start, queries.stop, device=q.device) // lists.size
            p.masked_fill_(~lists.visited[:, :, row][..., place // lists.size], 0.0)
        yield queries, keys, p


def _reach(parts, first: int, last: int, sk: int, multiple: int) -> slice:
    """The keys that queries at the positions `first` to `last` may see, from a multiple of `multiple` on."""
    ends, begins = [0], [sk]
    for _, own in parts:
        low, high = own.limits(torch.tensor([first, last], device="cpu"))
        begins.append(0 if own.sinks else int(low[0]))
        ends.append(max(int(high[1]) + 1, min(own.sinks, last + 1)))
    begin, end = max(0, min(begins)), min(sk, max(ends))
    begin = min(begin, end) // multiple * multiple
    return slice(begin, max(begin, end))


@torch.no_grad()
def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask | BlockMask | None = None,
    softmax_scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """How much attention every key gets from all queries together, [B, Hq, Sk] (packed: [Hq, T]). `mask`: None is
    causal.

    Raises ValueError for shapes that do not belong together. Source: the heavy hitters of H2O (arXiv 2306.14048).
    """
    _check(q, k, lse, mask, cu_seqlens)
    total = lse.new_zeros(*lse.shape[:-1], k.shape[-3])
    if cu_seqlens is not None:
        for _, keys, one in _by_sequence(q, k, lse, cu_seqlens, cu_seqlens_k):
            total[:, keys] = column_sums(*one, mask, softmax_scale)[0]
        return total
    for _, keys, p in _probabilities(q, k, lse, mask, softmax_scale):
        total[..., keys] += p.sum(2)
    return total


@torch.no_grad()
def block_maxima(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    size: int = 64,
    mask: Mask | BlockMask | None = None,
    softmax_scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """The largest probability in every block of `size` queries by `size` keys, [B, Hq, blocks of queries, blocks of
    keys] (packed: a list of [Hq, blocks of queries, blocks of keys], one a sequence). `mask`: None is causal.

    Raises ValueError for shapes that do not belong together or a size below 1.
    Source: what SeerAttention (arXiv 2410.13276) trains its gate towards.
    """
    if size < 1:
        raise ValueError(f"seal_ops.attention_maps: size must be at least 1, got {size}")
    _check(q, k, lse, mask, cu_seqlens)
    if cu_seqlens is not None:
        parts = _by_sequence(q, k, lse, cu_seqlens, cu_seqlens_k)
        return [block_maxima(*one, size, mask, softmax_scale)[0] for _, _, one in parts]
    blocks_q, blocks_k = -(-q.shape[1] // size), -(-k.shape[1] // size)
    found = lse.new_zeros(*lse.shape[:2], blocks_q, blocks_k)
    for queries, keys, p in _probabilities(q, k, lse, mask, softmax_scale, size):
        padded = torch.nn.functional.pad(p, (0, -p.shape[3] % size, 0, -p.shape[2] % size))
        maxima = padded.unflatten(3, (-1, size)).amax(4).unflatten(2, (-1, size)).amax(3)
        row, column = queries.start // size, keys.start // size
        found[:, :, row : row + maxima.shape[2], column : column + maxima.shape[3]] = maxima
    return found


@torch.no_grad()
def span_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: list[tuple[int, int]],
    mask: Mask | BlockMask | None = None,
    softmax_scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Which share of its attention every query gives to each span of keys [begin, end), [B, Hq, Sq, spans] (packed:
    [Hq, T, spans], spans counted in each sequence; keys that a sequence does not have count as none). `mask`: None is
    causal.

    Raises ValueError for shapes that do not belong together or a span outside 0 to Sk.
    """
    _check(q, k, lse, mask, cu_seqlens)
    for begin, end in spans:
        if not 0 <= begin <= end <= k.shape[-3]:
            raise ValueError(
                f"seal_ops.attention_maps: spans must lie from 0 to {k.shape[-3]} (the keys), got {(begin, end)}"
            )
    shares = lse.new_zeros(*lse.shape, len(spans))
    if cu_seqlens is not None:
        for tokens, keys, one in _by_sequence(q, k, lse, cu_seqlens, cu_seqlens_k):
            own = keys.stop - keys.start
            inside = [(min(begin, own), min(end, own)) for begin, end in spans]
            shares[:, tokens] = span_mass(*one, inside, mask, softmax_scale)[0]
        return shares
    for queries, keys, p in _probabilities(q, k, lse, mask, softmax_scale):
        for n, (begin, end) in enumerate(spans):
            inside = slice(max(0, begin - keys.start), max(0, end - keys.start))
            shares[:, :, queries, n] = p[..., inside].sum(-1)
    return shares
