"""The eight integers of a mask, read: which keys each query sees. The backends that are no GPU kernels use it.

Nothing here has a sentinel: what is unbounded is 2^30, and Python's and torch's 64-bit integers hold every sum.
"""

from __future__ import annotations

import typing

import torch
from torch import Tensor

from .masks import UNBOUNDED


class Visibility(typing.NamedTuple):
    """The integers in the order of the op's `mask` (masks.FIELDS); see masks.Mask for what they mean."""

    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED
    chunk: int = 0
    chunk_lower: int = -UNBOUNDED
    chunk_upper: int = UNBOUNDED
    shift: int = 0
    shifted_from: int = UNBOUNDED
    sinks: int = 0

    @classmethod
    def of(cls, causal: bool = True, window: int | None = None, mask: typing.Sequence[int] | None = None) -> Visibility:
        """What a call says: its mask, or the shorthands `causal` and `window`."""
        if mask is not None:
            return cls(*mask)
        reach = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
        return cls(lower=-reach, upper=0 if causal else reach)

    def by_heads(self, heads: int) -> list[tuple[slice, Visibility]]:
        """(query heads, what they see), one entry where all heads see the same; entries have no shifted heads, but
        `shift` in force for all of theirs."""
        still = self._replace(shift=0, shifted_from=0)
        if not self.shift or not self.chunk or self.shifted_from >= heads:
            return [(slice(0, heads), still)]
        parts = [(slice(0, self.shifted_from), still)] if self.shifted_from else []
        return [*parts, (slice(self.shifted_from, heads), self._replace(shifted_from=0))]

    def limits(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key that band and chunk let queries at these positions see (also outside the keys there are;
        first > last: none), int64. Of an entry of `by_heads`."""
        first, last = positions + self.lower, positions + self.upper
        if self.chunk:
            own = torch.div(positions + self.shift, self.chunk, rounding_mode="floor")
            first = torch.maximum(first, (own + self.chunk_lower) * self.chunk - self.shift)
            last = torch.minimum(last, (own + self.chunk_upper + 1) * self.chunk - self.shift - 1)
        return first, last

    def pairs(self, positions: Tensor, keys: Tensor) -> Tensor:
        """Boolean [queries, keys] for these positions of both. Of an entry of `by_heads`."""
        first, last = (t[:, None] for t in self.limits(positions))
        seen = (keys >= first) & (keys <= last)
        if self.sinks:
            seen |= (keys < self.sinks) & (keys <= positions[:, None])
        return seen

    def count(self, sq: int, sk: int, heads: int) -> float:
        """How many pairs a head sees, the mean over the heads."""
        total, positions = 0.0, torch.arange(sk - sq, sk)
        for part, own in self.by_heads(heads):
            low, high = own.limits(positions)
            low, high = low.clamp_(min=0), high.clamp_(max=sk - 1)
            sinks = positions.clamp(-1, min(self.sinks, sk) - 1) + 1
            in_both = (torch.minimum(high + 1, sinks) - low).clamp_(min=0)
            seen = (high - low + 1).clamp_(min=0) + sinks - in_both
            total += (part.stop - part.start) * float(seen.sum())
        return total / heads

    def cover(self, sq: int, sk: int, size: int, heads: int, device: torch.device | str) -> Tensor:
        """Boolean [heads or 1, blocks of queries, blocks of keys]: the blocks of `size` by `size` that hold a pair at
        all, and perhaps some that do not."""
        first = torch.arange(0, sq, size, device=device) + sk - sq
        last = (first + size - 1).clamp_(max=sk - 1)
        begin = torch.arange(0, sk, size, device=device)
        parts = []
        for part, own in self.by_heads(heads):
            low, high = own.limits(first)[0][:, None], own.limits(last)[1][:, None]
            seen = (begin + size > low) & (begin <= high)
            if self.sinks:
                seen |= (begin < self.sinks) & (begin <= last[:, None])
            parts.append(seen.expand(part.stop - part.start, -1, -1))
        return torch.cat(parts) if len(parts) > 1 else parts[0][:1]

    def allowed(self, sq: int, sk: int, heads: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """Boolean [heads, Sq, Sk], or [1, Sq, Sk] where all heads see the same. Whole: for the oracle and for tests."""
        positions, keys = torch.arange(sk - sq, sk, device=device), torch.arange(sk, device=device)
        parts = [(part, own.pairs(positions, keys)) for part, own in self.by_heads(heads)]
        if len(parts) == 1:
            return parts[0][1][None]
        return torch.cat([seen.expand(part.stop - part.start, -1, -1) for part, seen in parts])


def sequences(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[slice, slice]]:
    """Where each packed sequence lies in q and in k, read on the host (CPU backend and oracle only)."""
    cu_q = cu_seqlens.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    return [(slice(*a), slice(*b)) for a, b in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:]))]
