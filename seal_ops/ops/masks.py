"""Masks as plain descriptions: a signed band, chunks, shifted heads and sinks. `seal_ops.masks` is this module.

Query i of a sequence with Sq queries and Sk keys stands at position p = i + Sk - Sq (aligned to the end, as with a KV
cache). It sees key j where the band, the chunks and the sinks of a `Mask` let it; see there. Packed sequences each
have positions, chunks and sinks of their own.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor

UNBOUNDED = 1 << 30  # above every position, so that arithmetic with it stays in 32 bits
FIELDS = ("lower", "upper", "chunk", "chunk_lower", "chunk_upper", "shift", "shifted_from", "sinks")


@dataclasses.dataclass(frozen=True, repr=False)
class Mask:
    """Which keys a query at position p sees: key j where all of the band and the chunk say so, or where it is a sink.

    Band: lower <= j - p <= upper. Chunks (chunk > 0): chunk_lower <= c(j) - c(p) <= chunk_upper, where c(x) is
    floor((x + shift) / chunk) for the last `shifted_heads` (a share) of the query heads, and floor(x / chunk) for the
    others. Sinks: the keys before `sinks` are seen from everywhere, but never by an earlier query (j <= p).
    All in tokens. The functions of this module make the usual ones. Two masks are equal where their fields are.
    """

    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED
    chunk: int = 0
    chunk_lower: int = -UNBOUNDED
    chunk_upper: int = UNBOUNDED
    shift: int = 0
    shifted_heads: float = 0.0
    sinks: int = 0

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        said = (f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default)
        return f"Mask({', '.join(said)})"

    def resolve(self, heads: int) -> list[int]:
        """The eight integers that the ops take (FIELDS), for a number of query heads.

        Raises ValueError where `shifted_heads` is no whole number of them.
        """
        heads = int(heads) if isinstance(heads, Tensor) else heads  # torch.jit.trace
        shifted = round(self.shifted_heads * heads)
        if abs(shifted - self.shifted_heads * heads) > 1e-6:
            _fail("Mask", "shifted_heads", f"be a share that gives whole heads of {heads}", self.shifted_heads)
        shift = self.shift if shifted else 0
        shifted_from = heads - shifted if shift else UNBOUNDED
        return [
            self.lower,
            self.upper,
            self.chunk,
            self.chunk_lower,
            self.chunk_upper,
            shift,
            shifted_from,
            self.sinks,
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Of `mask` the pairs in the blocks that `visited` has; `blocks` makes it."""

    mask: Mask
    visited: Tensor
    size: int


def _fail(maker: str, argument: str, expected: str, received) -> None:
    raise ValueError(f"seal_ops.masks.{maker}: {argument} must {expected}, got {received}")


def _at_least(least: int, maker: str, argument: str, value) -> int:
    """The value as an integer of at most UNBOUNDED."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        _fail(maker, argument, f"be an integer of at least {least}", repr(value))
    return min(number, UNBOUNDED)


def causal() -> Mask:
    """Every key up to the query's own: what attention does without a mask."""
    return Mask(upper=0)


def full() -> Mask:
    """Every key."""
    return Mask()


def band(lower: int | None, upper: int | None) -> Mask:
    """Keys at a distance lower <= j - p <= upper in tokens; None: no bound. `band(None, -w)` sees what is at least w
    back. Raises ValueError where lower is above upper."""
    limits = []
    for name, value, unbounded in (("lower", lower, -UNBOUNDED), ("upper", upper, UNBOUNDED)):
        limits.append(unbounded if value is None else _at_least(-UNBOUNDED, "band", name, value))
    if limits[0] > limits[1]:
        _fail("band", "lower", f"not be above upper ({limits[1]})", limits[0])
    return Mask(*limits)


def window(size: int) -> Mask:
    """The last `size` keys up to the query's own, that one included. Raises ValueError for a size below 1."""
    return Mask(lower=1 - _at_least(1, "window", "size", size), upper=0)


def streaming(sinks: int, window: int) -> Mask:
    """The first `sinks` keys and the last `window` ones, the query's own included: a cost that does not grow with the
    length. Raises ValueError for sinks below 0 or a window below 1.

    Source: StreamingLLM (arXiv 2309.17453); the Λ of LM-Infinite (2308.16137); MInference's A-shape (2407.02490).
    """
    sinks, window = _at_least(0, "streaming", "sinks", sinks), _at_least(1, "streaming", "window", window)
    return Mask(lower=1 - window, upper=0, sinks=sinks)


def shifted_groups(group: int, shifted_heads: float = 0.5, sinks: int = 0) -> Mask:
    """Causal attention within groups of `group` tokens; the last `shifted_heads` (a share) of the query heads have
    groups moved by half of one. Nothing wraps around: the first half group of the shifted heads stands alone.

    With grouped-query attention the share has to be whole groups of heads (the call refuses others).
    Raises ValueError for a group below 1, a share outside 0 to 1, or sinks below 0.
    Source: S²-Attn of LongLoRA (arXiv 2309.12307), with sinks SF-Attn of SinkLoRA (2406.05678), where we take the
    causal reading.
    """
    group = _at_least(1, "shifted_groups", "group", group)
    try:
        fits = 0 <= shifted_heads <= 1
    except TypeError:
        fits = False
    if not fits:
        _fail("shifted_groups", "shifted_heads", "be a share from 0 to 1", shifted_heads)
    return dataclasses.replace(
        chunks(group),
        shift=group // 2 if shifted_heads else 0,
        shifted_heads=float(shifted_heads),
        sinks=_at_least(0, "shifted_groups", "sinks", sinks),
    )


def chunks(size: int, before: tuple[int, int | None] = (0, 0)) -> Mask:
    """Causal attention to the keys whose chunk of `size` tokens lies `before[0]` to `before[1]` (None: any number)
    chunks before the query's own.

    (0, 0) is the query's own chunk (Llama 4's chunked attention); (1, 1) the one before, and (2, None) all earlier
    ones are the other parts of dual chunk attention (arXiv 2402.17463).
    Raises ValueError for a size below 1, or a range that is not 0 <= before[0] <= before[1].
    """
    size = _at_least(1, "chunks", "size", size)
    expected = "be (least, most) chunks with 0 <= least <= most (most None: any number)"
    try:
        least, most = before
        least = _at_least(0, "chunks", "before", least)
        most = UNBOUNDED if most is None else _at_least(least, "chunks", "before", most)
    except (TypeError, ValueError):
        _fail("chunks", "before", expected, before)
    return Mask(upper=0, chunk=size, chunk_lower=-most, chunk_upper=-least)


def blocks(visited: Tensor, size: int = 128, mask: Mask | None = None) -> BlockMask:
    """Of `mask` (None: causal) only the blocks of `size` by `size` tokens that `visited` has.

    visited: bool [B or 1, heads or 1, blocks of queries, blocks of keys], on q's device: whether query i (counted from
    the first of the call) may see key j, at [i // size, j // size]. Lists for the kernels, in both directions, are made
    of it where it lies, without a sync. Time follows the blocks that are visited.
    Raises ValueError for a size that is no multiple of 32; the call refuses a shape that does not fit it.
    Source: the sparse patterns of MInference (arXiv 2407.02490), whose maps `seal_ops.ops.block_selection` makes, and
    SeerAttention (2410.13276).
    """
    size = _at_least(1, "blocks", "size", size)
    if size % 32:
        _fail("blocks", "size", "be a multiple of 32", size)
    if not isinstance(visited, Tensor) or visited.dtype != torch.bool or visited.dim() != 4:
        kind = f"{visited.dtype} {list(visited.shape)}" if isinstance(visited, Tensor) else type(visited).__name__
        _fail("blocks", "visited", "be a bool tensor [B or 1, heads or 1, blocks of queries, blocks of keys]", kind)
    if not isinstance(mask, (Mask, type(None))):
        _fail("blocks", "mask", "be made by seal_ops.masks", type(mask).__name__)
    return BlockMask(causal() if mask is None else mask, visited, size)
