"""Masks as plain descriptions: two integers that every backend reads, never a tensor.

Query i of a sequence with Sq queries and Sk keys stands at position i + Sk - Sq (aligned to the end, as with a KV
cache).
It may see key j where  position - left <= j <= position + right;  -1 means unbounded.
"""

from __future__ import annotations

import torch


def bounds(causal: bool, window: int | None) -> tuple[int, int]:
    """(left, right) of a causal flag and a sliding window of `window` keys, the query's own among them."""
    left = -1 if window is None else window - 1
    right = 0 if causal else left
    return left, right


def allowed(
    sq: int, sk: int, left: int, right: int, device: torch.device | str = "cpu", first: int | None = None
) -> torch.Tensor:
    """Boolean [Sq, Sk]: which keys each query may see; `first`: position of the first query (None: aligned to the
    end)."""
    first = sk - sq if first is None else first
    distance = torch.arange(sk, device=device)[None, :] - (torch.arange(sq, device=device)[:, None] + first)
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def empty_rows(sq: int, sk: int, right: int) -> int:
    """How many queries see no key at all. They are always the first ones: position + right < 0."""
    if sk == 0:
        return sq
    return 0 if right < 0 else min(sq, max(0, sq - sk - right))


def sequences(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> list[tuple[slice, slice]]:
    """Where each packed sequence lies in q and in k, read on the host (CPU backend and oracle only)."""
    cu_q = cu_seqlens.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    return [(slice(*a), slice(*b)) for a, b in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:]))]
