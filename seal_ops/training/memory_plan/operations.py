"""Floating-point operations of a call: matrix products by torch's own formulae, and those of the fused attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ...huggingface.modes import attention_ops


def operations_of(func, args: tuple, kwargs: dict, out) -> tuple[int, int]:
    """``(linear, attention)``: operations of one dispatched op, a multiplication and an addition as two."""
    if func in attention_ops():
        return 0, _attention(func, args, kwargs)
    packet = getattr(func, "overloadpacket", None)
    if packet not in flop_registry:
        return 0, 0
    if "attention" in packet.__name__:
        return 0, _torchs_attention(args) if "backward" not in packet.__name__ else 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out)), 0


def _torchs_attention(args: tuple) -> int:
    """Of a forward op of PyTorch's, all pairs counted; its own formula refuses fewer heads of keys than of queries."""
    q, k, v = args[:3]
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention(func, args: tuple, kwargs: dict) -> int:
    """4 D for each (query, key) pair of each head: two products."""
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    q, k = given["q"], given["k"]
    queries, keys = q.shape[-3], k.shape[-3]
    cu = given.get("cu_seqlens")
    if isinstance(cu, Tensor):  # sequences laid end to end
        lengths = torch.diff(cu).double()
        pairs = float((lengths**2).sum()) / (2 if given.get("causal", True) else 1)
    elif given.get("causal", True):
        window = given.get("window")
        pairs = queries * keys - queries * (queries - 1) / 2
        if window is not None and window < keys:
            pairs = min(pairs, queries * window)
    else:
        pairs = queries * keys
    rows = q.shape[0] if q.dim() == 4 else 1
    return round(4 * rows * q.shape[-2] * q.shape[-1] * pairs)
