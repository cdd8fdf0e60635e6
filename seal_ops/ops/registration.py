"""torch.ops.seal.*: schemas, bodies, fake kernels and autograd. docs/ops.md is the contract.

With the C++ extension the schemas come from there; without it the same schema file is parsed here.  What is not a CUDA
kernel (CPU, Triton, the oracle) runs through `_run`.
"""
from __future__ import annotations

import importlib
import pathlib

import torch
from torch import Tensor

from . import checks
from .dispatch import OPS, choose, extension, has_cuda_kernels


def schemas() -> list[str]:
    """The schemas of csrc/schemas.inc (in an installed package: a copy beside this file), one an op."""
    here = pathlib.Path(__file__).parent
    file = next(p for p in (here / "schemas.inc", here.parents[1] / "csrc" / "schemas.inc") if p.exists())
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
    return getattr(importlib.import_module(f".backends.{backend}", __package__), op)(**a)


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
