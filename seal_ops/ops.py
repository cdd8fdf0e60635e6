"""torch.ops.seal.*: schemas, bodies, fake kernels and autograd, and the wrappers users call. docs/ops.md is the contract.

With the C++ extension the schemas come from there, and CUDA tensors reach the sm_90a kernels without passing through
Python; without it the same schema file is parsed here. Everything else (CPU, Triton, the oracle) is `_run` below.
"""
from __future__ import annotations

import importlib
import pathlib

import torch
from torch import Tensor

from . import checks
from .backends import OPS, choose, extension, has_cuda_kernels


def schemas() -> list[str]:
    """The schemas of csrc/schemas.inc (in an installed package: a copy beside this file), one an op."""
    here = pathlib.Path(__file__).parent
    file = next(p for p in (here / "schemas.inc", here.parent / "csrc" / "schemas.inc") if p.exists())
    return [line for line in file.read_text().splitlines() if "->" in line]


_library = torch.library.Library("seal", "FRAGMENT")
if isinstance(extension(), str):
    for _schema in schemas():
        _library.define(_schema)
_seal = torch.ops.seal


def _bind(op: str, args, kwargs) -> dict:
    """Arguments by name, defaults filled in."""
    bound = {a.name: a.default_value for a in getattr(_seal, op).default._schema.arguments}
    bound.update(zip(bound, args))
    bound.update(kwargs)
    return bound


def _check(op: str, a: dict) -> None:
    packed = a.get("cu_seqlens") is not None
    if "cos" in a and a["cos"] is not None:
        if a["sin"] is None:
            checks.fail(op, "sin", "be given where cos is", None)
        # A packed tensor is recognised by its rank in `rope`, which takes no cu_seqlens.
        checks.rotation(op, a["q"], a["k"], a["cos"], a["sin"], a["positions"], a["positions_k"],
                        packed or (op == "rope" and a["q"].dim() == 3))
    if "v" in a:
        checks.attention(op, a["q"], a["k"], a["v"], a["scale"], a["offset"], a["softmax_scale"], a["window"],
                         a["cu_seqlens"], a["cu_seqlens_k"], a["max_seqlen"], a["max_seqlen_k"])
    if "grad_out" in a:
        checks.backward(a["q"], a["k"], a["grad_out"], a["grad_lse"], a["out"], a["lse"], a["scale"], a["offset"],
                        a["needs"])


def _run(op: str, args, kwargs):
    a = _bind(op, args, kwargs)
    _check(op, a)
    q = a["q"]
    for name in ("q", "k", "v", "grad_out", "cos", "sin"):
        if a.get(name) is not None and a[name].stride(-1) != 1:
            a[name] = a[name].contiguous()
    backend = choose(a.pop("backend"), op, q.device, q.dtype, q.shape[-1])
    if backend == "cuda":
        return getattr(torch.ops.seal_cuda, op)(**a)
    return getattr(importlib.import_module(f".{backend}", __package__), op)(**a)


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _fake_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=_statistics(q))


def _fake(op: str, args, kwargs):
    a = _bind(op, args, kwargs)
    _check(op, a)
    q = a["q"]
    if op == "attention":
        return _like(q), _fake_lse(q)
    if op == "rope":
        return _like(q), _like(a["k"])
    if op == "rope_attention":
        return _like(q), _fake_lse(q), _like(q), _like(a["k"])
    shapes = (q, a["k"], a["v"], a["scale"], a["offset"])
    return tuple(_like(t) if want and t is not None else q.new_empty(0, dtype=_statistics(q) if n > 2 else q.dtype)
                 for n, (want, t) in enumerate(zip(a["needs"], shapes)))


def _register(op: str) -> None:
    def run(*args, **kwargs):
        return _run(op, args, kwargs)

    def fake(*args, **kwargs):
        return _fake(op, args, kwargs)

    _library.impl(op, run, "CPU")
    if has_cuda_kernels():
        _portable.impl(op, run, "CUDA")
    else:
        _library.impl(op, run, "CUDA")
    torch.library.register_fake(f"seal::{op}", fake, lib=_library)


if has_cuda_kernels():
    _portable = torch.library.Library("seal_portable", "FRAGMENT")
for _op in OPS:
    _register(_op)


# Autograd. Only what asks for a gradient gets one: frozen weights leave the first layer's q, k and v out, say.

_KEPT = ("softmax_scale", "causal", "window", "max_seqlen", "max_seqlen_k", "deterministic", "backend")


def _save(ctx, names: dict, cu_seqlens, keyword: dict, first: tuple, needs) -> None:
    ctx.set_materialize_grads(False)
    tensors = (*first, *(names.get(n) for n in ("scale", "offset", "cos", "sin", "positions", "positions_k")),
               *cu_seqlens)
    ctx.save_for_backward(*tensors)
    ctx.keyword = {n: keyword[n] for n in _KEPT}
    ctx.keyword["interleaved"] = keyword.get("interleaved", False)
    ctx.needs = needs


def _needed(ctx) -> list[bool]:
    """Which inputs want a gradient. The dispatcher drops trailing arguments that equal their default; they want none."""
    return [*ctx.needs_input_grad, *[False] * 12]


def _grads(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, scale, offset; None for what was not asked for."""
    q, k, v, out, lse, scale, offset, cos, sin, positions, positions_k, cu, cu_k = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _seal.attention_backward(grad_out, grad_lse, q, k, v, out, lse, scale, offset, cos, sin, positions, positions_k,
                                     cu, cu_k, needs=ctx.needs, **ctx.keyword)
    return tuple(g if want else None for g, want in zip(grads, ctx.needs))


def _attention_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, scale, offset, *cu_seqlens = inputs
    _save(ctx, dict(scale=scale, offset=offset), cu_seqlens, keyword_only_inputs, (q, k, v, *output), _needed(ctx)[:5])


def _attention_backward(ctx, grad_out, grad_lse):
    return *_grads(ctx, grad_out, grad_lse), None, None


def _rope_attention_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, cos, sin, positions, positions_k, scale, offset, *cu_seqlens = inputs
    out, lse, q_rotated, k_rotated = output
    ctx.mark_non_differentiable(q_rotated, k_rotated)
    names = dict(scale=scale, offset=offset, cos=cos, sin=sin, positions=positions, positions_k=positions_k)
    needed = _needed(ctx)
    _save(ctx, names, cu_seqlens, keyword_only_inputs, (q_rotated, k_rotated, v, out, lse), [*needed[:3], *needed[7:9]])


def _rope_attention_backward(ctx, grad_out, grad_lse, _q, _k):
    q, k, v, scale, offset = _grads(ctx, grad_out, grad_lse)
    return q, k, v, None, None, None, None, scale, offset, None, None


def _rope_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs[2:])
    ctx.keyword = dict(keyword_only_inputs, inverse=not keyword_only_inputs["inverse"])


def _rope_backward(ctx, grad_q, grad_k):
    return (*_seal.rope(grad_q, grad_k, *ctx.saved_tensors, **ctx.keyword), None, None, None, None)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("seal::attention_backward: second derivatives are not implemented; detach the first gradient")


torch.library.register_autograd("seal::attention", _attention_backward, setup_context=_attention_context, lib=_library)
torch.library.register_autograd("seal::rope", _rope_backward, setup_context=_rope_context, lib=_library)
torch.library.register_autograd("seal::rope_attention", _rope_attention_backward, setup_context=_rope_attention_context,
                                lib=_library)
torch.library.register_autograd("seal::attention_backward", _no_second_derivative, lib=_library)


# What users call.

def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None = None, offset: Tensor | None = None, *,
              softmax_scale: float | None = None, causal: bool = True, window: int | None = None,
              cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen: int | None = None,
              max_seqlen_k: int | None = None, deterministic: bool | None = None, backend: str | None = None,
              return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`scale * softmax(softmax_scale * q k^T + mask) v + offset`, fused; differentiable in q, k, v, scale and offset.

    Shapes: q `[B, Sq, Hq, D]`, k and v `[B, Sk, Hkv, D]` (any strides but the last), or packed `[T, H, D]` with
    `cu_seqlens` int32 `[sequences + 1]` (`cu_seqlens_k` where the keys' lengths differ). Hq is a multiple of Hkv.
    scale: fp32 `[Hq]` (SEAL-H), `[Hq, D]` (SEAL-C), per batch row `[B, Hq, 1]` or `[B, Hq, D]`; offset: fp32 `[Hq, D]`.
    Masks: `causal` aligned to the end (query i sees keys up to i + Sk - Sq); `window` = number of keys a query sees,
    its own included. `softmax_scale` defaults to 1/sqrt(D). `max_seqlen` is an optional bound, no sync without it.
    `deterministic` (default: torch.are_deterministic_algorithms_enabled()) makes the gradients bitwise repeatable.
    `backend`: "auto", "cuda", "triton", "cpu" or "reference".

    Returns out `[B, Sq, Hq, D]` (packed `[T, Hq, D]`), with `return_lse` also the natural-log log-sum-exp `[B, Hq, Sq]`
    (packed `[Hq, T]`), fp32, -inf where a query sees no key (its attention output is 0).
    Raises ValueError, one sentence, for arguments outside this contract or a forced backend that cannot run.
    Source: SEAL (arXiv 2501.15225) section 4 for the scales; FlashAttention for the algorithm.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out, lse = _seal.attention(q, k, v, scale, offset, cu_seqlens, cu_seqlens_k, softmax_scale=softmax_scale,
                               causal=causal, window=window, max_seqlen=max_seqlen, max_seqlen_k=max_seqlen_k,
                               deterministic=deterministic, backend=backend or "auto")
    return (out, lse) if return_lse else out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None,
         positions_k: Tensor | None = None, *, interleaved: bool = False, inverse: bool = False,
         backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q `[B, Sq, Hq, D]` and k `[B, Sk, Hkv, D]` in one pass (also packed `[T, H, D]`).

    cos, sin: a table `[N, R/2]` read at `positions` (int, `[S]` or `[B, S]`; default: counted from 0, queries last), or
    values per token `[B, S, R/2]`. The first R channels turn: pairs (c, c + R/2), or (2c, 2c+1) when `interleaved`.
    `inverse` turns back. Returns the rotated q and k; differentiable. Raises ValueError outside this contract.
    Source: RoFormer (arXiv 2104.09864), eq. 34. `seal_ops.rope_tables` makes cos and sin.
    """
    return _seal.rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved, inverse=inverse,
                      backend=backend or "auto")


def rope_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None,
                   positions_k: Tensor | None = None, scale: Tensor | None = None, offset: Tensor | None = None, *,
                   interleaved: bool = False, softmax_scale: float | None = None, causal: bool = True,
                   window: int | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                   max_seqlen: int | None = None, max_seqlen_k: int | None = None, deterministic: bool | None = None,
                   backend: str | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention(*rope(q, k, ...), v, ...)` as one op that keeps only the rotated q and k for its backward, where the
    inverse rotation is applied as grad_q and grad_k are written. Arguments as in `rope` and `attention`; for packed
    input without positions they restart at 0 in every sequence."""
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if cu_seqlens is not None and positions is None:
        positions = packed_positions(cu_seqlens, q.shape[0], None if cu_seqlens_k is None else cu_seqlens_k)
        if cu_seqlens_k is not None:
            positions_k = packed_positions(cu_seqlens_k, k.shape[0])
    out, lse, _, _ = _seal.rope_attention(
        q, k, v, cos, sin, positions, positions_k, scale, offset, cu_seqlens, cu_seqlens_k, interleaved=interleaved,
        softmax_scale=softmax_scale, causal=causal, window=window, max_seqlen=max_seqlen, max_seqlen_k=max_seqlen_k,
        deterministic=deterministic, backend=backend or "auto")
    return (out, lse) if return_lse else out


def packed_positions(cu_seqlens: Tensor, tokens: int, cu_seqlens_k: Tensor | None = None) -> Tensor:
    """Positions int64 [tokens] that restart at 0 in every packed sequence, without a host sync; with `cu_seqlens_k` the
    queries are the last of each sequence's keys (position 0 where a query lies before its first key)."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True, out_int32=True).long()
    at = token - cu_seqlens[which]
    if cu_seqlens_k is not None:
        lengths, lengths_k = cu_seqlens.diff(), cu_seqlens_k.diff()
        at = (at + (lengths_k - lengths)[which]).clamp_min(0)
    return at
