"""Masks of a call as packed sequences, in which positions are counted: padding and documents are cut out first."""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import Tensor

from ..masks import CallMask


class Packing(typing.NamedTuple):
    """Which of the B * Sq queries and B * Sk keys there are, as sequences laid end to end; None: all of them.

    ``longest``: no sequence has more keys.  ``rows``: whether every batch row is one sequence, with a scale of its own.
    """

    queries: Tensor | None
    keys: Tensor | None
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None
    longest: int
    rows: bool


def packing_of(mask: CallMask, q: Tensor, k: Tensor) -> Packing | None:
    """The sequences of a call with q [B, Sq, Hq, D] and k [B, Sk, Hkv, D]; None where whole rows are causal.

    Raises ValueError for a mask that is not causal, with padding or documents.
    """
    batch, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    if mask.dense is not None:
        return _read(mask.dense, batch, sq, sk)
    if not mask.causal or mask.window is not None:
        raise ValueError("seal_ops: an extended model must have causal masks, got another one; call seal_ops.unextend")
    if mask.cu_seqlens is None:
        return None
    if mask.tokens is not None:
        tokens = mask.tokens.long()
        return Packing(tokens, tokens, mask.cu_seqlens, None, sk, not mask.padding_too)
    return Packing(None, None, mask.cu_seqlens, None, batch * sk, False)


def _read(dense: Tensor, batch: int, sq: int, sk: int) -> Packing:
    """Padding or documents, read from a mask [B or 1, 1, Sq, Sk] of all pairs, and checked against what they mean."""
    seen = _seen(dense)
    if seen is None or seen.dim() != 4 or seen.shape[1] != 1:
        raise _unreadable()
    seen = seen[:, 0, :, :sk].expand(batch, sq, sk)
    column = torch.arange(sk, device=seen.device)
    if sq == sk:
        slots = column
        real = seen.diagonal(dim1=1, dim2=2)
        first = torch.where(real, seen.int().argmax(2), 0)  # of the query's document
    else:
        used = seen.any(1).any(0)
        last = int(used.nonzero().max()) if bool(used.any()) else sq - 1  # a static cache is longer
        slots = torch.arange(last - sq + 1, last + 1, device=seen.device)
        real, first = seen[:, -1], torch.zeros(batch, sq, dtype=torch.long, device=seen.device)
    if int(slots[0]) < 0:
        raise _unreadable()
    asked = real[:, slots]
    expected = real[:, None] & (column <= slots[:, None]) & (column >= first[..., None])
    if not torch.equal(seen & asked[..., None], expected & asked[..., None]):
        raise _unreadable()
    keys, queries = (t.flatten().nonzero().squeeze(1) for t in (real, asked))
    if sq == sk:
        row = torch.arange(batch, device=seen.device)[:, None] * sk
        lengths = torch.unique_consecutive((row + first).flatten()[keys], return_counts=True)[1]
        single = len(lengths) == batch and bool(real.any(1).all())
        return Packing(queries, keys, _ends(lengths), None, sk, single)
    return Packing(queries, keys, _ends(asked.sum(1)), _ends(real.sum(1)), sk, True)


def _seen(dense: Tensor) -> Tensor | None:
    if dense.dtype == torch.bool:
        return dense
    seen = dense == 0
    hidden = dense <= torch.finfo(dense.dtype).min / 2
    return seen if bool((seen | hidden).all()) else None


def _ends(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def _unreadable() -> ValueError:
    return ValueError(
        "seal_ops: an extended model must have masks that are causal with padding or documents, got another pattern"
    )


def run_packed(packing: Packing, attend: Callable, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None) -> Tensor:
    """``attend`` on the packed sequences of a batch; 0 where a query is padding. Returns [B, Sq, Hq, D]."""
    if scale is not None and scale.dim() == 3 and not packing.rows:
        raise ValueError(
            f"seal_ops: packed rows must have scales for all rows alike, got scales for each of {q.shape[0]} rows"
        )
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    if packing.keys is not None:
        flat_k, flat_v = (t.index_select(0, packing.keys) for t in (flat_k, flat_v))
    picked = flat_q if packing.queries is None else flat_q.index_select(0, packing.queries)
    lengths = dict(cu_seqlens=packing.cu_seqlens, cu_seqlens_k=packing.cu_seqlens_k)
    if packing.rows:
        lengths |= dict(max_seqlen=q.shape[1])
    out = attend(picked, flat_k, flat_v, longest=packing.longest, scale=scale, **lengths)
    if packing.queries is not None:
        out = out.new_zeros(flat_q.shape).index_copy(0, packing.queries, out)
    return out.unflatten(0, q.shape[:2])
