"""Argument checks of the ops: one sentence each, naming op, argument, expectation and what was received.

They run before every Python-registered body and in the fake kernels (so a wrong call already fails while it is traced);
the C++ boundary repeats those that guard memory (csrc/ops/checks.h).
"""
from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fail(op: str, argument: str, expected: str, received) -> None:
    raise ValueError(f"seal::{op}: {argument} must {expected}, got {received}")


def _shape(t: Tensor) -> str:
    return str([int(n) if isinstance(n, int) else n for n in t.shape])


def qkv(op: str, q: Tensor, k: Tensor, v: Tensor | None, packed: bool) -> None:
    layout = "packed [T, H, D] with cu_seqlens" if packed else "[B, S, H, D] (or [T, H, D] with cu_seqlens)"
    named = [("q", q), ("k", k)] + ([] if v is None else [("v", v)])
    for name, t in named:
        if t.dim() != (3 if packed else 4):
            fail(op, name, f"have the layout {layout}", f"{t.dim()} dimensions {_shape(t)}")
        if t.dtype not in FLOATS:
            fail(op, name, "be bfloat16, float16, float32 or float64", t.dtype)
        if t.dtype != q.dtype:
            fail(op, name, f"have q's dtype {q.dtype}", t.dtype)
        if t.device != q.device:
            fail(op, name, f"be on q's device {q.device}", t.device)
        if t.shape[-1] != q.shape[-1]:
            fail(op, name, f"have q's head_dim {q.shape[-1]}", t.shape[-1])
        if not packed and t.shape[0] != q.shape[0]:
            fail(op, name, f"have q's batch size {q.shape[0]}", t.shape[0])
    if q.shape[-1] < 1 or q.shape[-1] > 256:
        fail(op, "q", "have a head_dim from 1 to 256", q.shape[-1])
    if v is not None and v.shape != k.shape:
        fail(op, "v", f"have k's shape {_shape(k)}", _shape(v))
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2] != 0:
        fail(op, "q", f"have a number of heads that is a multiple of k's {k.shape[-2]}", q.shape[-2])


def _factor(op: str, name: str, t: Tensor, q: Tensor, rows, per_head: bool) -> None:
    heads, head_dim = q.shape[-2:]
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    if t.dtype != expected:
        fail(op, name, f"be {expected} (with {q.dtype} q)", t.dtype)
    if t.device != q.device:
        fail(op, name, f"be on q's device {q.device}", t.device)
    shapes = [(heads, head_dim), (rows, heads, head_dim)]
    if per_head:
        shapes += [(heads,), (rows, heads), (rows, heads, 1), (1, heads, 1)]
    shapes += [(1, heads, head_dim)]
    if tuple(t.shape) not in shapes:
        kinds = f"[{heads}] (per head), [{heads}, {head_dim}] (per channel)" if per_head else f"[{heads}, {head_dim}]"
        rowed = f"[{rows}, {heads}, 1] or [{rows}, {heads}, {head_dim}]" if per_head else f"[{rows}, {heads}, {head_dim}]"
        fail(op, name, f"have shape {kinds} or, per batch row, {rowed}", _shape(t))


def _cu_seqlens(op: str, name: str, t: Tensor, q: Tensor, total) -> None:
    if t.dtype != torch.int32 or t.dim() != 1 or t.shape[0] < 1:
        fail(op, name, "be int32 of shape [sequences + 1]", f"{t.dtype} {_shape(t)}")
    if t.device != q.device:
        fail(op, name, f"be on q's device {q.device}", t.device)
    if t.device.type == "cpu" and not isinstance(t, torch._subclasses.FakeTensor):
        values = t.tolist()
        if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:])):
            fail(op, name, f"start at 0, never fall and end at {total} (the packed tokens)", values)


def attention(op: str, q: Tensor, k: Tensor, v: Tensor, scale, offset, softmax_scale, window, cu_seqlens, cu_seqlens_k,
              max_seqlen, max_seqlen_k) -> None:
    packed = cu_seqlens is not None
    qkv(op, q, k, v, packed)
    rows = q.shape[0]
    if packed:
        _cu_seqlens(op, "cu_seqlens", cu_seqlens, q, q.shape[0])
        if cu_seqlens_k is not None:
            _cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q, k.shape[0])
            if cu_seqlens_k.shape != cu_seqlens.shape:
                fail(op, "cu_seqlens_k", f"have cu_seqlens' shape {_shape(cu_seqlens)}", _shape(cu_seqlens_k))
        elif q.shape[0] != k.shape[0]:
            fail(op, "cu_seqlens_k", f"be given where k ({k.shape[0]} tokens) and q ({q.shape[0]}) differ", None)
        rows = cu_seqlens.shape[0] - 1
    elif cu_seqlens_k is not None or max_seqlen is not None or max_seqlen_k is not None:
        fail(op, "cu_seqlens_k, max_seqlen and max_seqlen_k", "come with cu_seqlens", "cu_seqlens=None")
    if window is not None and window < 1:
        fail(op, "window", "be at least 1 (the keys a query sees, its own included)", window)
    if softmax_scale is not None and not softmax_scale == softmax_scale:
        fail(op, "softmax_scale", "be a number", softmax_scale)
    if scale is not None:
        _factor(op, "scale", scale, q, rows, per_head=True)
    if offset is not None:
        _factor(op, "offset", offset, q, rows, per_head=False)


def rotation(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions, positions_k, packed: bool) -> None:
    qkv(op, q, k, None, packed)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in FLOATS:
            fail(op, name, "be of a floating dtype", t.dtype)
        if t.device != q.device:
            fail(op, name, f"be on q's device {q.device}", t.device)
        if t.dim() not in (2, 3) or (t.dim() == 3 and packed):
            fail(op, name, "have shape [N, R/2] (a table) or, for dense q, [B, S, R/2]", _shape(t))
        if t.shape != cos.shape:
            fail(op, name, f"have cos' shape {_shape(cos)}", _shape(t))
    if 2 * cos.shape[-1] > q.shape[-1] or cos.shape[-1] < 1:
        fail(op, "cos", f"turn at most head_dim {q.shape[-1]} channels (last size R/2 from 1 to {q.shape[-1] // 2})",
             cos.shape[-1])
    sq, sk = q.shape[-3], k.shape[-3]
    if cos.dim() == 3:
        if positions is not None or positions_k is not None:
            fail(op, "positions", "be None with cos and sin already gathered per token [B, S, R/2]", "positions")
        if sq != sk or cos.shape[1] != sq or cos.shape[0] not in (1, q.shape[0]):
            fail(op, "cos", f"have shape [{q.shape[0]} or 1, {sq}, R/2] with Sq = Sk", f"{_shape(cos)} with Sk {sk}")
        return
    if positions is None:
        if positions_k is not None:
            fail(op, "positions", "be given where positions_k is", None)
        if packed:
            fail(op, "positions", "be given for packed q and k (int32 or int64 [T])", None)
        if cos.shape[0] < max(sq, sk):
            fail(op, "cos", f"have a row for each of {max(sq, sk)} positions", _shape(cos))
        return
    if positions_k is None and sq != sk:
        fail(op, "positions_k", f"be given where Sq ({sq}) and Sk ({sk}) differ", None)
    for name, t, s in (("positions", positions, sq), ("positions_k", positions_k, sk)):
        if t is None:
            continue
        if t.dtype not in (torch.int32, torch.int64):
            fail(op, name, "be int32 or int64", t.dtype)
        if t.device != q.device:
            fail(op, name, f"be on q's device {q.device}", t.device)
        shapes = [(s,)] if packed else [(s,), (q.shape[0], s), (1, s)]
        if tuple(t.shape) not in shapes:
            fail(op, name, f"have shape [{s}]" + ("" if packed else f" or [{q.shape[0]}, {s}]"), _shape(t))
        if t.device.type == "cpu" and t.numel() and not isinstance(t, torch._subclasses.FakeTensor):
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= cos.shape[0]:
                fail(op, name, f"lie from 0 to {cos.shape[0] - 1} (the rows of cos)", f"{low} to {high}")


def backward(q: Tensor, k: Tensor, grad_out: Tensor, grad_lse, out: Tensor, lse: Tensor, scale, offset, needs) -> None:
    op = "attention_backward"
    for name, t in (("grad_out", grad_out), ("out", out)):
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            fail(op, name, f"be like q ({_shape(q)} {q.dtype} on {q.device})", f"{_shape(t)} {t.dtype} on {t.device}")
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    for name, t in (("lse", lse), ("grad_lse", grad_lse)):
        if t is not None and (tuple(t.shape) != shape or t.dtype != statistics or t.device != q.device):
            fail(op, name, f"have shape {list(shape)}, {statistics}, on {q.device}", f"{_shape(t)} {t.dtype} on {t.device}")
    for name, t, want in (("scale", scale, needs[3]), ("offset", offset, needs[4])):
        if want and t is None:
            fail(op, f"needs[{name}]", f"be False where {name} is None", True)
