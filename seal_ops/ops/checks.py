"""Argument checks of the ops: one sentence each, naming op, argument, expectation and what was received.

They run in the fake kernels (so a wrong call already fails while it is traced) and, in a build without the C++
extension, before every body. csrc/ops/checks.cpp says the same sentences for real tensors; one table of tests holds
both to it."""

from __future__ import annotations

import functools
import math
import re

import torch
from torch import Tensor

from .masks import FIELDS, UNBOUNDED

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fail(op: str, argument: str, expected: str, received) -> None:
    raise ValueError(f"seal::{op}: {argument} must {expected}, got {received}")


def statistics(q: Tensor) -> torch.dtype:
    """dtype of scale, offset, lse and their gradients."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check(op: str, a: dict) -> None:
    """Raises ValueError for a call outside the contract (docs/ops.md). `a`: the op's arguments by name."""
    required(op, a)
    packed = _qkv(op, a)
    if "v" in a:
        rows = _packing(op, a, packed)
        _mask(op, a)
        _blocks(op, a, packed, rows)
        _factor(op, "scale", a["scale"], a["q"], rows, per_head=True)
        _factor(op, "offset", a["offset"], a["q"], rows, per_head=False)
        terms(op, a["q"], a["offset"], a["sink"], a["gate"], a["gate_function"])
        if (cap := a["softcap"]) is not None and not (math.isfinite(cap) and cap > 0):
            fail(op, "softcap", "be finite and above 0", f"{cap:g}")
    if "cos" in a:
        _rotation(op, a, packed)
    if "grad_out" in a:
        _backward(op, a)


@functools.cache
def _required(op: str) -> tuple[str, ...]:
    return tuple(a.name for a in getattr(torch.ops.seal, op).default._schema.arguments if str(a.type) == "Tensor")


def required(op: str, a: dict) -> None:
    """Raises ValueError where an argument that must be a tensor is None, which the dispatcher lets pass."""
    for name in _required(op):
        tensor(op, name, a[name])


def tensor(op: str, name: str, value) -> None:
    """Raises ValueError for what is no tensor, or a nested one, which has no sizes to check."""
    if not isinstance(value, Tensor):
        fail(op, name, "be a tensor", None if value is None else type(value).__name__)
    if value.is_nested:
        dense(op, name, value)


def dense(op: str, name: str, t: Tensor) -> None:
    """Raises ValueError for a tensor of another layout than the strided one, or a quantized tensor."""
    if t.layout != torch.strided or t.is_nested or t.is_quantized:
        kind = "a nested tensor" if t.is_nested else "a quantized tensor" if t.is_quantized else t.layout
        fail(op, name, "be a dense tensor", kind)


def all_dense(op: str, a: dict) -> None:
    """`dense` of every tensor among the arguments of a call, by name; also of those in lists."""
    for name, value in a.items():
        lists = isinstance(value, (list, tuple))
        for n, t in enumerate(value if lists else [value]):
            if isinstance(t, Tensor):
                dense(op, f"{name}[{n}]" if lists else name, t)


_MISTYPED = re.compile(r"Expected a value of type '([^']+)' for argument '(\w+)' but instead found type '([^']+)'")
_MEANING = {"Tensor": "a tensor", "int": "an integer", "float": "a number", "bool": "True or False", "str": "a text"}


def raise_mistyped(op: str, error: RuntimeError, **given) -> None:
    """Raises what the dispatcher said of an argument of another type as one sentence, a ValueError; else as it was.

    `given`: the call's tensors. A jagged one answers in its own words where nothing of ours runs before it (under
    `torch.inference_mode`).
    """
    all_dense(op, given)
    found = _MISTYPED.search(str(error))
    if found is None:
        raise error
    wanted, name, got = found.groups()
    optional = wanted.removeprefix("Optional[").removesuffix("]") if wanted.startswith("Optional[") else None
    meaning = _MEANING.get(optional or wanted, "a list of integers")
    raise ValueError(f"seal::{op}: {name} must be {meaning}{' or None' if optional else ''}, got {got}") from None


def differentiable(op: str, a: dict) -> bool:
    """Whether a gradient is to be recorded. Raises where there is none, or where a tensor is not an ordinary one."""
    recording, wanted = torch.is_grad_enabled(), False
    for name, t in a.items():
        if not isinstance(t, Tensor):
            continue
        dense(op, name, t)
        if torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"seal::{op}: forward-mode differentiation is not implemented, and {name} has a tangent; "
                "use reverse mode (backward, torch.autograd.grad)"
            )
        if recording and t.requires_grad:
            if name in ("cos", "sin"):
                fail(op, name, "be without a gradient (none flows into the angles; detach it)", "requires_grad=True")
            wanted = True
    return wanted


def _shape(t: Tensor) -> str:
    return str([int(n) if isinstance(n, int) else n for n in t.shape])


def _kind(t: Tensor) -> str:
    return f"{_shape(t)} {t.dtype} on {t.device}"


def _readable(t: Tensor) -> bool:
    """Whether the contents can be read without a transfer from a device, and are there."""
    return t.device.type == "cpu" and not isinstance(t, torch._subclasses.FakeTensor)


def _qkv(op: str, a: dict) -> bool:
    """Returns whether the tensors are packed; `rope` takes no cu_seqlens and knows that by their rank."""
    q, k, v = a["q"], a["k"], a.get("v")
    packed = q.dim() == 3 if op == "rope" else a["cu_seqlens"] is not None
    if op == "rope":
        layout = "[B, S, H, D] or packed [T, H, D], as q"
    else:
        layout = "packed [T, H, D] with cu_seqlens" if packed else "[B, S, H, D] (or [T, H, D] with cu_seqlens)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t is None:
            continue
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
        batch, tokens, heads = 1 if packed else t.shape[0], t.shape[-3], t.shape[-2]
        if all(isinstance(n, int) for n in t.shape) and not (  # a size that is still a symbol gets no guard for this
            tokens < 2**30 and heads < 2**16 and batch < 2**31 // max(1, tokens)
        ):
            fail(op, name, "have fewer than 2^30 tokens a row, 2^31 tokens in all and 2^16 heads", _shape(t))
    if q.shape[-1] < 1 or q.shape[-1] > 256:
        fail(op, "q", "have a head_dim from 1 to 256", q.shape[-1])
    if v is not None:
        if v.shape != k.shape:
            fail(op, "v", f"have k's shape {_shape(k)}", _shape(v))
        if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2] != 0:
            fail(op, "q", f"have a number of heads that is a multiple of k's {k.shape[-2]}", q.shape[-2])
    return packed


def _lengths(op: str, name: str, t: Tensor, q: Tensor, total) -> int:
    """Checks cu_seqlens; returns the longest sequence where the contents can be read, else 0."""
    if t.dtype != torch.int32 or t.dim() != 1 or t.shape[0] < 1:
        fail(op, name, "be int32 of shape [sequences + 1]", f"{t.dtype} {_shape(t)}")
    if t.device != q.device:
        fail(op, name, f"be on q's device {q.device}", t.device)
    if not _readable(t):
        return 0
    values = t.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:])):
        fail(op, name, f"start at 0, never fall and end at {total} (the packed tokens)", values)
    return max((b - a for a, b in zip(values, values[1:])), default=0)


def _packing(op: str, a: dict, packed: bool):
    """Returns the number of batch rows or packed sequences."""
    q, k, cu, cu_k = a["q"], a["k"], a["cu_seqlens"], a["cu_seqlens_k"]
    if not packed:
        if cu_k is not None or a["max_seqlen"] is not None or a["max_seqlen_k"] is not None:
            fail(op, "cu_seqlens_k, max_seqlen and max_seqlen_k", "come with cu_seqlens", "cu_seqlens=None")
        return q.shape[0]
    longest = longest_k = _lengths(op, "cu_seqlens", cu, q, q.shape[0])
    if cu_k is not None:
        longest_k = _lengths(op, "cu_seqlens_k", cu_k, q, k.shape[0])
        if cu_k.shape != cu.shape:
            fail(op, "cu_seqlens_k", f"have cu_seqlens' shape {_shape(cu)}", _shape(cu_k))
    elif q.shape[0] != k.shape[0]:
        fail(op, "cu_seqlens_k", f"be given where k ({k.shape[0]} tokens) and q ({q.shape[0]}) differ", None)
    for name, least in (("max_seqlen", longest), ("max_seqlen_k", longest_k)):
        if a[name] is not None and a[name] < least:
            fail(op, name, f"be at least {least} (the longest sequence)", a[name])
    return cu.shape[0] - 1


def _mask(op: str, a: dict) -> None:
    sigma, window = a["softmax_scale"], a["window"]
    if sigma is not None and not math.isfinite(sigma):
        fail(op, "softmax_scale", "be finite", f"{sigma:g}")
    if window is not None and window < 1:
        fail(op, "window", "be at least 1 (the keys a query sees, its own included)", window)
    if a["mask"] is None:
        return
    if window is not None or not a["causal"]:
        fail(op, "mask", "come without window and causal=False", "window" if a["causal"] else "causal=False")
    mask = [int(n) for n in a["mask"]]
    if len(mask) != len(FIELDS):
        fail(op, "mask", f"have {len(FIELDS)} integers ({', '.join(FIELDS)})", len(mask))
    if max(mask) > UNBOUNDED or min(mask) < -UNBOUNDED:
        fail(op, "mask", "have integers from -2^30 to 2^30", mask)
    lower, upper, chunk, chunk_lower, chunk_upper, shift, shifted_from, sinks = mask
    if lower > upper or chunk_lower > chunk_upper:
        fail(op, "mask", "have lower <= upper and chunk_lower <= chunk_upper", mask)
    if chunk < 0 or sinks < 0 or shifted_from < 0 or not 0 <= shift < max(chunk, 1):
        fail(op, "mask", "have chunk, shifted_from and sinks of at least 0, and a shift from 0 to below chunk", mask)
    heads, group = a["q"].shape[-2], a["q"].shape[-2] // a["k"].shape[-2]
    if shift and shifted_from < heads and shifted_from % group:
        expected = f"shift whole groups of {group} query heads, those that share a key/value head"
        fail(op, "mask", expected, f"heads from {shifted_from} on")


def _blocks(op: str, a: dict, packed: bool, rows) -> None:
    t, size = a["blocks"], a["block_size"]
    if t is None:
        return
    q, k = a["q"], a["k"]
    if packed:
        fail(op, "blocks", "come without cu_seqlens", "packed sequences")
    if size <= 0 or size % 32 or size > 1 << 20:
        fail(op, "block_size", "be a multiple of 32 up to 2^20", size)
    if t.dtype != torch.bool:
        fail(op, "blocks", "be torch.bool", t.dtype)
    if t.device != q.device:
        fail(op, "blocks", f"be on q's device {q.device}", t.device)
    heads, blocks_q, blocks_k = q.shape[-2], -(-q.shape[1] // size), -(-k.shape[1] // size)
    fits = t.dim() == 4 and t.shape[0] in (1, rows) and t.shape[1] in (1, heads)
    if not fits or t.shape[2] != blocks_q or t.shape[3] != blocks_k:
        fail(op, "blocks", f"have shape [{rows} or 1, {heads} or 1, {blocks_q}, {blocks_k}]", _shape(t))


def _factor(op: str, name: str, t: Tensor | None, q: Tensor, rows, per_head: bool) -> None:
    if t is None:
        return
    heads, head_dim = q.shape[-2:]
    if t.dtype != statistics(q):
        fail(op, name, f"be {statistics(q)} (with {q.dtype} q)", t.dtype)
    if t.device != q.device:
        fail(op, name, f"be on q's device {q.device}", t.device)
    shapes = [(heads, head_dim), (rows, heads, head_dim)]
    if per_head:
        shapes += [(heads,), (rows, heads), (rows, heads, 1), (1, heads, 1)]
    shapes += [(1, heads, head_dim)]
    if tuple(t.shape) not in shapes:
        kinds = f"[{heads}] (per head), [{heads}, {head_dim}] (per channel)" if per_head else f"[{heads}, {head_dim}]"
        rowed = (
            f"[{rows}, {heads}, 1] or [{rows}, {heads}, {head_dim}]" if per_head else f"[{rows}, {heads}, {head_dim}]"
        )
        fail(op, name, f"have shape {kinds} or, per batch row, {rowed}", _shape(t))


def terms(
    op: str,
    q: Tensor,
    offset: Tensor | None,
    sink: Tensor | None,
    gate: Tensor | None,
    gate_function: str,
    functions: tuple = ("sigmoid", "softplus"),
) -> None:
    """What follows the softmax over keys. `functions`: what a gate may pass through."""
    if gate_function not in functions:
        fail(op, "gate_function", f"be one of {', '.join(functions)}", repr(gate_function))
    for name, t in (("sink", sink), ("gate", gate)):
        if t is None:
            continue
        tensor(op, name, t)
        if t.dtype not in FLOATS:
            fail(op, name, "be bfloat16, float16, float32 or float64", t.dtype)
        if t.device != q.device:
            fail(op, name, f"be on q's device {q.device}", t.device)
        if offset is not None:
            tensor(op, "offset", offset)
            fail(op, "offset", f"be None with a {name} (add it to the output)", _shape(offset))
    if sink is not None and tuple(sink.shape) != (q.shape[-2],):
        fail(op, "sink", f"have shape [{q.shape[-2]}] (one logit a query head)", _shape(sink))
    if gate is not None and tuple(gate.shape) not in (tuple(q.shape), one := (*q.shape[:-1], 1)):
        fail(op, "gate", f"have q's shape {_shape(q)} or {list(one)}", _shape(gate))


def _rotation(op: str, a: dict, packed: bool) -> None:
    q, cos, sin, positions, positions_k = a["q"], a["cos"], a["sin"], a["positions"], a["positions_k"]
    if cos is None:
        if sin is not None or positions is not None or positions_k is not None:
            fail(op, "cos", "be given where sin or positions are", None)
        return
    if sin is None:
        fail(op, "sin", "be given where cos is", None)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in FLOATS:
            fail(op, name, "be bfloat16, float16, float32 or float64", t.dtype)
        if t.device != q.device:
            fail(op, name, f"be on q's device {q.device}", t.device)
        if t.dim() not in (2, 3) or (t.dim() == 3 and packed):
            fail(op, name, "have shape [N, R/2] (a table) or, for dense q, [B, S, R/2]", _shape(t))
        if t.shape != cos.shape:
            fail(op, name, f"have cos' shape {_shape(cos)}", _shape(t))
    if 2 * cos.shape[-1] > q.shape[-1] or cos.shape[-1] < 1:
        fail(
            op,
            "cos",
            f"turn at most head_dim {q.shape[-1]} channels (last size R/2 from 1 to {q.shape[-1] // 2})",
            cos.shape[-1],
        )
    sq, sk = q.shape[-3], a["k"].shape[-3]
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
        if _readable(t) and t.numel():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= cos.shape[0]:
                fail(op, name, f"lie from 0 to {cos.shape[0] - 1} (the rows of cos)", f"{low} to {high}")


def _backward(op: str, a: dict) -> None:
    q = a["q"]
    for name in ("grad_out", "out"):
        t = a[name]
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            fail(op, name, f"be like q ({_kind(q)})", _kind(t))
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    for name in ("lse", "grad_lse"):
        t = a[name]
        if t is not None and (tuple(t.shape) != shape or t.dtype != statistics(q) or t.device != q.device):
            fail(op, name, f"be {list(shape)} {statistics(q)} on {q.device}", _kind(t))
    if len(a["needs"]) not in (5, 7):
        fail(op, "needs", "have 5 flags (q, k, v, scale, offset), or 7 (also sink, gate)", len(a["needs"]))
