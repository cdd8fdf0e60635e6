"""Position programs: attention whose parts see other positions than where queries and keys stand.

The keys that a query sees are divided into parts. Each part turns q and k by positions of its own and runs the ordinary
fused attention under its mask; `merge_attention` puts the parts together exactly. q and k come unrotated, so a cache
keeps unrotated keys. Positions are counted in each batch row or packed sequence, and queries are the last of its keys.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, epilogue, factors, masks
from .functional import packed_positions, rope_attention
from .masks import UNBOUNDED, Mask
from .merging import merge_attention


class Part(typing.NamedTuple):
    """Keys that queries see under a mask, and the positions that both sides are turned to."""

    mask: Mask
    query: Callable[[Tensor], Tensor]  # positions of the queries, int64 -> those that turn them
    key: Callable[[Tensor], Tensor]
    first: int = 0  # of dense tensors: no query sees an earlier key; a multiple of the mask's chunk
    empty: bool = False  # of dense tensors: no query sees any


class Sinks(typing.NamedTuple):
    """The first keys, where they lie at least `back` tokens before the query."""

    number: int
    back: int
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


def self_extend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, group: int, window: int, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-Extend: true positions for the last `window` keys, positions of groups of `group` tokens before them.

    A near key (less than `window` tokens back) at j meets the query at p with the positions (p, j), a far one with
    (p // group + window - window // group, j // group): distances stay below a trained length c up to about
    window + group (c - window) tokens.

    Args:
        q, k, v: `[B, Sq, Hq, D]` and `[B, Sk, Hkv, D]`, or packed; *not rotated*.
        cos, sin: a table `[N, R/2]` with a row for each of the Sk positions.
        group, window: in tokens.
        options: those of `capped`.

    Returns:
        out, with `return_lse` (out, lse), as `seal_ops.attention`.

    Raises:
        ValueError: a group or window below 1, a short table, or arguments outside the ops' contract.

    Source:
        Self-Extend (arXiv 2401.01325), section 3.
    """
    group, window = _at_least(1, "self_extend", "group", group), _at_least(1, "self_extend", "window", window)
    _rows("self_extend", cos, k, options)
    apart, last = window - window // group, cos.shape[0] - 1
    near = _near(q, k, window)
    # Queries that see a far key are turned by less than their own position, so the bound moves none of them.
    far = Part(
        masks.band(None, -window),
        lambda p: (p // group + apart).clamp_max(last),
        lambda j: j // group,
        empty=k.shape[-3] <= window,
    )
    return _run(q, k, v, cos, sin, [near, far], **options)


def dual_chunk(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, chunk: int, length: int, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """Dual chunk attention: positions within chunks of `chunk` tokens, for a model trained on `length` tokens.

    A query at p meets a key at j of its own chunk with the positions (p mod chunk, j mod chunk), of the chunk before
    with (min(p mod chunk + chunk, length - 1), j mod chunk), of an earlier one with (length - 1, j mod chunk). No
    distance reaches `length`; the last length - chunk ones are true.

    Args:
        q, k, v, cos, sin: as in `self_extend`; the table needs `length` rows.
        chunk, length: in tokens.
        options: those of `capped`.

    Returns:
        out, with `return_lse` (out, lse), as `seal_ops.attention`.

    Raises:
        ValueError: a chunk below 1 or above `length`, a short table, or arguments outside the ops' contract.

    Source:
        Dual chunk attention (arXiv 2402.17463), section 3; Qwen2.5-1M (2501.15383).
    """
    chunk, length = _at_least(1, "dual_chunk", "chunk", chunk), _at_least(1, "dual_chunk", "length", length)
    if chunk > length:
        raise ValueError(f"seal_ops.dual_chunk: chunk must be at most the trained length {length}, got {chunk}")
    _rows("dual_chunk", cos, k, options, least=length)
    sq, sk = q.shape[-3], k.shape[-3]
    within = lambda x: x % chunk
    own, last = (
        max(0, n) // chunk * chunk for n in (sk - sq, sk - 1)
    )  # where the chunks of first and last query begin
    before, earlier = masks.chunks(chunk, (1, 1)), masks.chunks(chunk, (2, None))
    parts = [
        Part(masks.chunks(chunk), within, within, own),
        Part(before, lambda p: (p % chunk + chunk).clamp_max(length - 1), within, own - chunk, empty=last < chunk),
        Part(earlier, lambda p: torch.full_like(p, length - 1), within, empty=last < 2 * chunk),
    ]
    return _run(q, k, v, cos, sin, parts, **options)


def capped(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, sinks: int, window: int, limit: int | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """LM-Infinite: the last `window` keys at their true distance, the first `sinks` ones at the distance `limit`.

    A sink that the window reaches keeps its true distance. Time goes by sinks + window.

    Args:
        q, k, v, cos, sin: as in `self_extend`.
        sinks, window: in keys.
        limit: in tokens; `window` where it is None.
        options: scale, softmax_scale, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, interleaved, deterministic,
            backend and return_lse as in `seal_ops.rope_attention`; softcap and sink, learned logits `[Hq]`, as in
            `seal_ops.attention`.

    Returns:
        out, with `return_lse` (out, lse), as `seal_ops.attention`.

    Raises:
        ValueError: sinks below 0, a window or limit below 1, a short table, or arguments outside the ops' contract.

    Source:
        LM-Infinite (arXiv 2308.16137), section 4.
    """
    limit = window if limit is None else limit
    sinks, window = _at_least(0, "capped", "sinks", sinks), _at_least(1, "capped", "window", window)
    limit = _at_least(1, "capped", "limit", limit)
    _rows("capped", cos, k, options)
    if cos.shape[0] <= limit:
        raise ValueError(f"seal_ops.capped: limit must be below the {cos.shape[0]} rows of cos, got {limit}")
    first = Sinks(sinks, window, lambda p: torch.full_like(p, limit), torch.zeros_like)
    return _run(q, k, v, cos, sin, [_near(q, k, window), first], **options)


def streaming(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, sinks: int, window: int, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """StreamingLLM: the last `window` keys and the first `sinks` ones, as they lie in a cache of sinks + window tokens.

    Distances in the window are true; a sink j beyond it meets a query with the positions (min(p, sinks + window - 1),
    j).

    Args:
        q, k, v, cos, sin: as in `self_extend`.
        sinks, window: in keys.
        options: those of `capped`.

    Returns:
        out, with `return_lse` (out, lse), as `seal_ops.attention`.

    Raises:
        ValueError: as `capped`.

    Source:
        StreamingLLM (arXiv 2309.17453), section 3.2.
    """
    sinks, window = _at_least(0, "streaming", "sinks", sinks), _at_least(1, "streaming", "window", window)
    _rows("streaming", cos, k, options)
    first = Sinks(sinks, window, lambda p: p.clamp_max(sinks + window - 1), _as_is)
    return _run(q, k, v, cos, sin, [_near(q, k, window), first], **options)


def _near(q: Tensor, k: Tensor, window: int) -> Part:
    return Part(masks.window(window), _as_is, _as_is, first=k.shape[-3] - q.shape[-3] - window + 1)


def _rows(program: str, cos: Tensor, k: Tensor, options: dict, least: int = 0) -> None:
    """Raises where a position has no row in the table, as far as lengths are known without reading a device."""
    longest = least or k.shape[-3] if options.get("cu_seqlens") is None else options.get("max_seqlen_k") or 0
    if cos.dim() != 2:
        raise ValueError(f"seal_ops.{program}: cos must be a table [N, R/2], got {list(cos.shape)}")
    if cos.shape[0] < longest:
        raise ValueError(
            f"seal_ops.{program}: cos must have a row for each of {longest} positions, got {list(cos.shape)}"
        )


def _as_is(positions: Tensor) -> Tensor:
    return positions


def _at_least(least: int, program: str, argument: str, value) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"seal_ops.{program}: {argument} must be an integer of at least {least}, got {value!r}")
    return min(number, UNBOUNDED)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    parts: list[Part | Sinks],
    *,
    scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    sink: Tensor | None = None,
    **common,
):
    common |= dict(return_lse=True)
    if cu_seqlens is None:
        attend = _dense(q, k, v, cos, sin, scale, common)
    else:
        attend = _packed(q, k, v, cos, sin, scale, cu_seqlens, cu_seqlens_k, common)
    found = [one for one in map(attend, parts) if one is not None]
    out, lse = found[0] if len(found) == 1 else merge_attention(*zip(*found), backend=_merger(common))
    checks.terms("attention", q, None, sink, None, "sigmoid")
    out, lse = epilogue.apply(out, lse, sink, None, "sigmoid")  # once, not in every part
    return (out, lse) if return_lse else out


def _merger(common: dict) -> str | None:
    """The merge's backend where attention's is forced: what CUDA has no kernel for is Triton's."""
    backend = common.get("backend")
    return "triton" if backend == "cuda" else backend


def _dense(q, k, v, cos, sin, scale, common):
    """What runs one part on dense tensors: (out, lse), or None where no query sees a key of it."""
    sq, sk = q.shape[1], k.shape[1]
    p = torch.arange(sk - sq, sk, device=q.device).clamp_min(0)

    def attend(part: Part | Sinks):
        first, stop = 0, sk
        if isinstance(part, Sinks):
            stop = min(part.number, sk - part.back)
            if stop <= 0:
                return None
            mask = masks.band(None, sk - part.back - stop)  # aligned to the end of the keys that are left
        elif part.empty:
            return None
        else:
            mask, first = part.mask, min(max(0, part.first), sk)
        j = torch.arange(first, stop, device=q.device)
        kept = k[:, first:stop], v[:, first:stop]
        return rope_attention(q, *kept, cos, sin, part.query(p), part.key(j), scale, mask=mask, **common)

    return attend


def _packed(q, k, v, cos, sin, scale, cu_seqlens, cu_seqlens_k, common):
    """What runs one part on packed sequences: (out, lse). Nothing is read from the device."""
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    p = packed_positions(cu_seqlens, q.shape[0], cu_k)
    j = packed_positions(cu_k, k.shape[0])

    def attend(part: Part | Sinks):
        query, key = part.query(p), part.key(j)
        if not isinstance(part, Sinks):
            lengths = dict(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
            return rope_attention(q, k, v, cos, sin, query, key, scale, mask=part.mask, **lengths, **common)
        if part.number == 0:
            return None
        # The last `back` keys of every sequence are moved behind all of them, into a sequence without queries. What is
        # left is aligned to its end, so a query sees a sink where it lies `back` tokens before it.
        lengths = cu_k.diff()
        kept = (lengths - part.back).clamp_min(0)
        which = torch.searchsorted(cu_k[1:].contiguous(), torch.arange(k.shape[0], device=k.device), right=True)
        order = (j >= kept[which.clamp_max(len(lengths) - 1)]).to(torch.uint8).argsort(stable=True)
        ends = torch.cat([cu_k[:1], kept.cumsum(0), torch.full_like(cu_k[:1], k.shape[0])]).to(torch.int32)
        rows = torch.cat([cu_seqlens, cu_seqlens[-1:]])
        factor = scale
        if scale is not None and (rows_of := factors.full_view(scale, *q.shape[-2:])).shape[0] > 1:
            factor = torch.cat([rows_of, rows_of[-1:]])
        mask = Mask(lower=UNBOUNDED, upper=UNBOUNDED, sinks=part.number)  # an empty band: nothing but sinks
        moved = k[order], v[order], cos, sin, query, key[order]
        options = common | dict(max_seqlen_k=None)  # the keys moved behind may be more than the longest sequence
        return rope_attention(q, *moved, factor, mask=mask, cu_seqlens=rows, cu_seqlens_k=ends, **options)

    return attend
