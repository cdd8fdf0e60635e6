"""Merging attention outputs over parts of the keys: seal::merge_attention with its checks, bodies and gradient.

The op takes lists of tensors, which the C++ extension's kernels for autograd do not read: all of it is registered here,
in every build."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, registration
from .autograd import bind
from .dispatch import MERGE_OPS, choose


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them; differentiable in outputs and log-sum-exps.

    `lse = log(sum exp(lse_i))` and `out = sum exp(lse_i - lse) out_i`. A row that no part sees gives 0 and -inf, and
    its gradients are 0. Parts made with the same scale may be merged as they are.

    Args:
        outs: the parts' outputs, each `[B, S, H, D]` (or packed `[T, H, D]`), bf16, fp16, fp32 or fp64.
        lses: their natural-log log-sum-exps, each `[B, H, S]` (packed `[H, T]`), fp32 (fp64 with fp64 outputs); -inf
            in a row where the part sees no key, whose output is not read then.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        (out, lse), shaped as the parts' are.

    Raises:
        ValueError: parts that do not fit together, or a backend that cannot run.

    Source:
        The combination step of FlashAttention (arXiv 2205.14135, algorithm 1).
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            checks.fail("merge_attention", name, "be a list of tensors", type(parts).__name__)
        for n, part in enumerate(parts):
            checks.tensor("merge_attention", f"{name}[{n}]", part)
    if not outs:  # the dispatcher chooses by the tensors
        checks.fail("merge_attention", "outs", "hold at least one part", "none")
    try:
        return torch.ops.seal.merge_attention.default(list(outs), list(lses), backend=backend or "auto")
    except RuntimeError as error:
        checks.raise_mistyped("merge_attention", error)


def check(op: str, a: dict) -> None:
    """Raises ValueError for a call outside the contract. `a`: the op's arguments by name."""
    checks.required(op, a)
    outs, lses = a["outs"], a["lses"]
    if len(lses) != len(outs):
        checks.fail(op, "lses", f"be as many as outs ({len(outs)})", len(lses))
    first = outs[0]
    if first.dim() not in (3, 4):
        checks.fail(op, "outs[0]", "have the layout [B, S, H, D] or packed [T, H, D]", f"{first.dim()} dimensions")
    if first.dtype not in checks.FLOATS:
        checks.fail(op, "outs[0]", "be bfloat16, float16, float32 or float64", first.dtype)
    for n, part in enumerate(outs):
        if part.shape != first.shape or part.dtype != first.dtype or part.device != first.device:
            checks.fail(op, f"outs[{n}]", f"be like outs[0] ({_kind(first)})", _kind(part))
    shape = _rows(first)
    given = [(f"lses[{n}]", t) for n, t in enumerate(lses)]
    if "grad_out" in a:
        g = a["grad_out"]
        if g.shape != first.shape or g.dtype != first.dtype or g.device != first.device:
            checks.fail(op, "grad_out", f"be like outs[0] ({_kind(first)})", _kind(g))
        given += [("grad_lse", a["grad_lse"])] if a["grad_lse"] is not None else []
    for name, t in given:
        if tuple(t.shape) != shape or t.dtype != checks.statistics(first) or t.device != first.device:
            checks.fail(op, name, f"be {list(shape)} {checks.statistics(first)} on {first.device}", _kind(t))


def _kind(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


def _rows(out: Tensor) -> tuple[int, ...]:
    """Shape of the log-sum-exp that belongs to an output."""
    return (*out.shape[:-3], out.shape[-2], out.shape[-3])


def _body(op: str):
    def run(*args, **kwargs):
        a = bind(op, args, kwargs)
        check(op, a)
        out = a["outs"][0]
        backend = choose(a.pop("backend"), op, out.device, out.dtype, out.shape[-1])
        return getattr(importlib.import_module(f".backends.{backend}", __package__), op)(**a)

    return run


def _fake(op: str):
    def fake(*args, **kwargs):
        a = bind(op, args, kwargs)
        check(op, a)
        out = a["outs"][0]
        parts = () if op == "merge_attention" else (len(a["outs"]),)
        return out.new_empty((*parts, *out.shape)), out.new_empty((*parts, *_rows(out)), dtype=checks.statistics(out))

    return fake


class _Merge(torch.autograd.Function):
    """`parts` outputs, then as many log-sum-exps."""

    @staticmethod
    def forward(ctx, run, parts, backend, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.parts, ctx.backend = parts, backend
        ctx.set_materialize_grads(False)
        return run()

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + 2 * ctx.parts)
        saved = ctx.saved_tensors  # asked for once: checkpointing gives them once
        outs, lses = saved[: ctx.parts], saved[ctx.parts :]
        grad_out = torch.zeros_like(outs[0]) if grad_out is None else grad_out
        grads = torch.ops.seal.merge_attention_backward(grad_out, grad_lse, outs, lses, backend=ctx.backend)
        return None, None, None, *grads[0].unbind(), *grads[1].unbind()


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *_):
        return run()

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "seal::merge_attention_backward: derivatives of its outputs (second derivatives of a merge) are not "
            "implemented; detach them"
        )


def _kernel(op: str):
    """The op's kernel for the dispatcher's Autograd key."""

    def kernel(keyset, *args, **kwargs):
        a = bind(op, args, kwargs)

        def run():
            with torch._C._AutoDispatchBelowAutograd():
                below = keyset & torch._C._after_autograd_keyset
                return getattr(torch.ops.seal, op).default.redispatch(below, *args, **kwargs)

        named = {f"{name}[{n}]": t for name in ("outs", "lses") for n, t in enumerate(a[name])}
        named |= {name: a[name] for name in ("grad_out", "grad_lse") if a.get(name) is not None}
        if not checks.differentiable(op, named):
            return run()
        if op != "merge_attention":
            return _NoDerivative.apply(run, *named.values())
        check(op, a)
        return _Merge.apply(run, len(a["outs"]), a["backend"], *a["outs"], *a["lses"])

    return kernel


for _op in MERGE_OPS:
    for _key in ("CPU", "CUDA"):
        registration.library.impl(_op, _body(_op), _key)
    registration.refuse_other_layouts(_op)
    torch.library.register_fake(f"seal::{_op}", _fake(_op), lib=registration.library)
    registration.library.impl(_op, _kernel(_op), "Autograd", with_keyset=True)
