"""The correctness gate: no contestant is timed before its results agree with an fp64 oracle on the very tensors it is
timed on.

At 128k tokens no oracle can hold a score matrix, so this one walks the queries in blocks, in fp64, for one key/value
head of one batch row and the query heads that read it; every tensor of a contestant is compared there. Errors are
relative (‖x − ref‖ / ‖ref‖) and taken per sixteenth of the sequence, the worst counts: a causal output shrinks as its
row grows, so one norm over all rows would not see a wrong tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.backends import reference
from ..ops.visibility import Visibility

SECTIONS = 16
# Relative error that plain roundings of operands and results leave, by dtype; a wrong mask, head or scale gives 0.1 and
# more.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}


def attention_slice(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: Tensor | None, seen: Visibility
) -> dict[str, Tensor]:
    """Attention and its gradients for one key/value head: q, grad_out [S, G, D], k, v [S, D], scale [G, D]; `seen` is
    an entry of Visibility.by_heads, and no query sees a later key.

    Returns out, grad_q [S, G, D], grad_k, grad_v [S, D] and, with a scale, grad_scale [G, D]: the formulae of
    docs/ops.md in fp64, a block of queries at a time.
    """
    q, k, v, grad_out = (t.double() for t in (q, k, v, grad_out))
    length, group, head_dim = q.shape
    sigma = 1 / math.sqrt(head_dim)
    factor = torch.ones(group, head_dim, dtype=torch.float64, device=q.device) if scale is None else scale.double()
    unscaled, grad_q, grad_k, grad_v = (
        torch.empty_like(q),
        torch.empty_like(q),
        torch.zeros_like(k),
        torch.zeros_like(v),
    )
    block = max(64, min(1024, (1 << 27) // length))
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        positions = torch.arange(start, rows.stop, device=q.device)
        first = 0 if seen.sinks else max(0, int(seen.limits(positions[:1])[0]))
        keys = slice(first, rows.stop)
        hidden = ~seen.pairs(positions, torch.arange(first, rows.stop, device=q.device))
        for head in range(group):
            scores = (q[rows, head] @ k[keys].T).mul_(sigma).masked_fill_(hidden, -math.inf)
            p = torch.softmax(scores, -1)
            g = grad_out[rows, head] * factor[head]
            o = p @ v[keys]
            grad_v[keys] += p.T @ g
            ds = (g @ v[keys].T).sub_((g * o).sum(-1, keepdim=True)).mul_(p).mul_(sigma)
            grad_k[keys] += ds.T @ q[rows, head]
            grad_q[rows, head] = ds @ k[keys]
            unscaled[rows, head] = o
    found = {"out": unscaled * factor, "grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    if scale is not None:
        found["grad_scale"] = (grad_out * unscaled).sum(0)
    return found


def rotated_attention_slice(q, k, v, grad_out, scale, seen, cos, sin) -> dict[str, Tensor]:
    """The same with the half-split rotation of q and k before it, positions counted from 0; cos, sin [S, D/2]."""
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    turned_q = reference.turn(q.double(), cos, sin, False)
    turned_k = reference.turn(k.double()[:, None], cos, sin, False)[:, 0]
    found = attention_slice(turned_q, turned_k, v, grad_out, scale, seen)
    found["grad_q"] = reference.turn(found["grad_q"], cos, -sin, False)
    found["grad_k"] = reference.turn(found["grad_k"][:, None], cos, -sin, False)[:, 0]
    return found


def error(found: Tensor, expected: Tensor, by_section: bool) -> float:
    """Relative error, the worst over SECTIONS parts of the leading dimension (the sequence) if `by_section`. NaN counts
    as inf."""
    found, expected = found.double(), expected.double()
    parts = min(SECTIONS, len(expected)) if by_section else 1
    worst = 0.0
    for a, b in zip(found.chunk(parts), expected.chunk(parts)):
        e = float((a - b).norm() / b.norm().clamp_min(1e-30))
        worst = max(worst, math.inf if math.isnan(e) else e)
    return worst
