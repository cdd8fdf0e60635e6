"""Sums and maxima of the attention probabilities, from q, k and the log-sum-exp, a chunk of queries at a time.

Memory is that of one chunk of rows, never Sq x Sk; time is a product of Q and K^T. Nothing here has a gradient. q is
[B, Sq, Hq, D], k [B, Sk, Hkv, D]; `lse` [B, Hq, Sq] is what `attention(..., return_lse=True)` gave for the same mask
and softmax_scale. A query that sees no key counts as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .masks import Mask, causal
from .visibility import Visibility

_ELEMENTS = 1 << 25  # of a chunk's probabilities, all batch rows and heads together


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, softmax_scale: float | None, multiple: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """(queries, their probabilities [B, Hq, queries, Sk]) in fp32 (fp64 for fp64); a chunk is whole multiples of
    `multiple` queries but for the last."""
    batch, sq, heads, head_dim = q.shape
    sk, group = k.shape[1], heads // k.shape[2]
    if tuple(lse.shape) != (batch, heads, sq):
        raise ValueError(
            f"seal_ops.attention_maps: lse must have shape [{batch}, {heads}, {sq}], got {list(lse.shape)}"
        )
    sigma = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    seen = Visibility(*(causal() if mask is None else mask).resolve(heads))
    keys = torch.arange(sk, device=q.device)
    k = k.to(lse.dtype).transpose(1, 2)[:, :, None]
    rows = max(1, _ELEMENTS // max(1, batch * heads * sk) // multiple) * multiple
    for start in range(0, sq, rows):
        queries = slice(start, min(start + rows, sq))
        positions = torch.arange(queries.start, queries.stop, device=q.device) + sk - sq
        grouped = q[:, queries].to(lse.dtype).transpose(1, 2).unflatten(1, (-1, group))
        scores = (grouped @ k.transpose(-1, -2)).flatten(1, 2).mul_(sigma)
        level = lse[:, :, queries, None]
        p = torch.exp(scores.sub_(level.masked_fill(level == -math.inf, math.inf)))
        for part, own in seen.by_heads(heads):
            p[:, part].masked_fill_(~own.pairs(positions, keys), 0.0)
        yield queries, p


@torch.no_grad()
def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None = None, softmax_scale: float | None = None
) -> Tensor:
    """How much attention every key gets from all queries together, [B, Hq, Sk]. `mask`: None is causal.

    Raises ValueError for a log-sum-exp of another shape. Source: the heavy hitters of H2O (arXiv 2306.14048).
    """
    total = lse.new_zeros(*lse.shape[:2], k.shape[1])
    for _, p in _probabilities(q, k, lse, mask, softmax_scale):
        total += p.sum(2)
    return total


@torch.no_grad()
def block_maxima(
    q: Tensor, k: Tensor, lse: Tensor, size: int = 64, mask: Mask | None = None, softmax_scale: float | None = None
) -> Tensor:
    """The largest probability in every block of `size` queries by `size` keys, [B, Hq, blocks of queries, blocks of
    keys]. `mask`: None is causal.

    Raises ValueError for a log-sum-exp of another shape or a size below 1.
    Source: what SeerAttention (arXiv 2410.13276) trains its gate towards.
    """
    if size < 1:
        raise ValueError(f"seal_ops.attention_maps: size must be at least 1, got {size}")
    found = []
    for _, p in _probabilities(q, k, lse, mask, softmax_scale, size):
        padded = torch.nn.functional.pad(p, (0, -p.shape[3] % size, 0, -p.shape[2] % size))
        found.append(padded.unflatten(3, (-1, size)).amax(4).unflatten(2, (-1, size)).amax(3))
    blocks_k = -(-k.shape[1] // size)
    return torch.cat(found, 2) if found else lse.new_zeros(*lse.shape[:2], 0, blocks_k)


@torch.no_grad()
def span_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: list[tuple[int, int]],
    mask: Mask | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Which share of its attention every query gives to each span of keys [begin, end), [B, Hq, Sq, spans]. `mask`:
    None is causal. Raises ValueError for a log-sum-exp of another shape or a span outside 0 to Sk."""
    for begin, end in spans:
        if not 0 <= begin <= end <= k.shape[1]:
            raise ValueError(
                f"seal_ops.attention_maps: spans must lie from 0 to {k.shape[1]} (the keys), got {(begin, end)}"
            )
    shares = lse.new_zeros(*lse.shape, len(spans))
    for queries, p in _probabilities(q, k, lse, mask, softmax_scale):
        for n, (begin, end) in enumerate(spans):
            shares[:, :, queries, n] = p[..., begin:end].sum(-1)
    return shares
