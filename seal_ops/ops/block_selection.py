"""Which blocks a head is worth visiting, from the scores of its last queries: maps for `masks.blocks`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .masks import streaming
from .visibility import Visibility


def _last_probabilities(q: Tensor, k: Tensor, last: int, softmax_scale: float | None) -> Tensor:
    """Causal probabilities [B, Hq, last, Sk] of the last queries, fp32."""
    batch, sq, heads, head_dim = q.shape
    sk, group = k.shape[1], heads // k.shape[2]
    last = min(last, sq)
    sigma = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    grouped = q[:, sq - last :].float().transpose(1, 2).unflatten(1, (-1, group))
    scores = (grouped @ k.float().transpose(1, 2)[:, :, None].transpose(-1, -2)).flatten(1, 2) * sigma
    positions = torch.arange(sk - last, sk, device=q.device)
    later = torch.arange(sk, device=q.device) > positions[:, None]
    return torch.softmax(scores.masked_fill(later, -math.inf), -1).nan_to_num()  # a query before the first key


@torch.no_grad()
def vertical_slash(
    q: Tensor,
    k: Tensor,
    verticals: int = 1000,
    slashes: int = 6096,
    *,
    size: int = 128,
    last: int = 64,
    softmax_scale: float | None = None,
) -> Tensor:
    """The blocks of each head's `verticals` most seen keys and `slashes` most seen distances, as the `last` queries
    see them; the diagonal and the first block of keys always. q [B, Sq, Hq, D], k [B, Sk, Hkv, D], causal.

    Returns bool [B, Hq, blocks of queries, blocks of keys] for `masks.blocks(..., size)`. Memory: `last` rows of
    scores, and the map. Raises ValueError for counts below 0, or a size or `last` below 1.
    Source: MInference (arXiv 2407.02490), vertical-slash heads.
    """
    for name, value, least in (
        ("verticals", verticals, 0),
        ("slashes", slashes, 0),
        ("size", size, 1),
        ("last", last, 1),
    ):
        if value < least:
            raise ValueError(f"seal_ops.block_selection: {name} must be at least {least}, got {value}")
    batch, sq, heads, _ = q.shape
    sk = k.shape[1]
    p = _last_probabilities(q, k, last, softmax_scale)
    blocks_q, blocks_k = -(-sq // size), -(-sk // size)
    visited = torch.zeros(batch, heads, blocks_q, blocks_k + 1, dtype=torch.bool, device=q.device)  # + what is outside
    columns = p.sum(2).topk(min(verticals, sk), -1).indices // size
    visited |= torch.zeros(batch, heads, blocks_k + 1, dtype=torch.bool, device=q.device).scatter_(2, columns, True)[
        :, :, None
    ]
    # Probability by distance: row i of `last` holds distance d at key (its position) - d.
    rows = torch.arange(sk - p.shape[2], sk, device=q.device)
    distances = torch.arange(sk, device=q.device)
    at = rows[:, None] - distances
    by_distance = p.gather(3, at.clamp(min=0).expand_as(p)).masked_fill(at < 0, 0.0).sum(2)
    chosen = by_distance.topk(min(slashes, sk), -1).indices
    first = torch.arange(0, sq, size, device=q.device) + sk - sq
    end = (first + size - 1).clamp(max=sk - 1)
    for positions in (first, end):  # a diagonal crosses at most two blocks of keys in a block of queries
        key = positions[:, None] - chosen[:, :, None]
        visited.scatter_(3, torch.where(key >= 0, key.div(size, rounding_mode="floor"), blocks_k), True)
    visited = visited[..., :blocks_k]
    own = torch.arange(blocks_k, device=q.device) * size
    visited |= (own <= end[:, None]) & (own + size > first[:, None])
    visited[..., :1] = True
    return visited & Visibility.of().cover(sq, sk, size, 1, q.device)


@torch.no_grad()
def a_shape(q: Tensor, k: Tensor, sinks: int = 1024, window: int = 4096, *, size: int = 128) -> Tensor:
    """The blocks of the first `sinks` keys and of the last `window` ones, bool [1, 1, blocks of queries, blocks of
    keys]: for the heads of a `masks.blocks` map that are to stream while others do not. q [B, Sq, Hq, D], k [B, Sk,
    Hkv, D]. Raises ValueError as `masks.streaming`. Source: MInference (arXiv 2407.02490), A-shape heads."""
    seen = Visibility(*streaming(sinks, window).resolve(q.shape[2]))
    return seen.cover(q.shape[1], k.shape[1], size, 1, q.device)[None]


@torch.no_grad()
def cheaper_a_shape(
    q: Tensor, k: Tensor, sinks: int, window: int, keeps: float, *, last: int = 64, softmax_scale: float | None = None
) -> Tensor:
    """Whether A-shape keeps at least the share `keeps` of what the `last` queries attend to, bool [B, Hq]: the heads
    for which it is enough. Source: MInference (arXiv 2407.02490), the choice of a head's pattern."""
    p = _last_probabilities(q, k, last, softmax_scale)
    sk = k.shape[1]
    seen = Visibility(*streaming(sinks, window).resolve(q.shape[2]))
    positions, keys = torch.arange(sk - p.shape[2], sk, device=q.device), torch.arange(sk, device=q.device)
    kept = p.masked_fill(~seen.pairs(positions, keys), 0.0).sum(-1)
    return kept.mean(-1) >= keeps
