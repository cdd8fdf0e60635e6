"""Differentiation of the ops in a build without the C++ extension (csrc/ops/autograd.cpp is the same, and faster).

Only what asks for a gradient gets one: frozen weights leave the first layer's q, k and v out, say.
"""

from __future__ import annotations

import functools

import torch

from . import checks

DIFFERENTIABLE = ("q", "k", "v", "scale", "offset", "sink", "gate")
_READ = ("cos", "sin", "positions", "positions_k", "cu_seqlens", "cu_seqlens_k", "blocks")
_OPTIONS = (
    "softmax_scale",
    "causal",
    "window",
    "mask",
    "block_size",
    "max_seqlen",
    "max_seqlen_k",
    "deterministic",
    "backend",
    "interleaved",
    "gate_function",
    "softcap",
)


@functools.cache
def _defaults(op: str) -> dict:
    return {a.name: a.default_value for a in getattr(torch.ops.seal, op).default._schema.arguments}


def bind(op: str, args, kwargs) -> dict:
    """Arguments by name, defaults filled in."""
    bound = dict(_defaults(op))
    bound.update(zip(bound, args))
    bound.update(kwargs)
    return bound


class _Call:
    """One call on its way below autograd."""

    def __init__(self, op: str, keyset, args, kwargs):
        self.op, self.arguments = op, bind(op, args, kwargs)
        self._below = keyset & torch._C._after_autograd_keyset
        self._args, self._kwargs = args, kwargs

    def run(self):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.seal, self.op).default.redispatch(self._below, *self._args, **self._kwargs)


class _Attention(torch.autograd.Function):
    """attention and rope_attention: DIFFERENTIABLE get gradients; rotated q and k have none of their own."""

    @staticmethod
    def forward(ctx, call, q, k, v, scale, offset, sink, gate):
        out, lse, *rotated = call.run()
        if rotated:
            ctx.mark_non_differentiable(*rotated)
            q, k = rotated
        read = (call.arguments.get(name) for name in _READ)
        ctx.save_for_backward(q, k, v, scale, offset, sink, gate, *read, out, lse)
        ctx.options = {name: call.arguments[name] for name in _OPTIONS if name in call.arguments}
        ctx.set_materialize_grads(False)
        return out, lse, *rotated

    @staticmethod
    def backward(ctx, grad_out, grad_lse, *_):
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(DIFFERENTIABLE))
        q, k, v, scale, offset, sink, gate, *read, out, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:])
        grads = torch.ops.seal.attention_backward(
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            scale,
            offset,
            **dict(zip(_READ, read)),
            sink=sink,
            gate=gate,
            needs=needs,
            **ctx.options,
        )
        return None, *(grad if want else None for grad, want in zip(grads, needs))


class _Rope(torch.autograd.Function):
    """The rotation is orthogonal: its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, call, q, k):
        a = call.arguments
        ctx.save_for_backward(a["cos"], a["sin"], a["positions"], a["positions_k"])
        ctx.options = dict(interleaved=a["interleaved"], inverse=not a["inverse"], backend=a["backend"])
        ctx.set_materialize_grads(False)
        outputs = call.run()
        ctx.tokens = [t.shape[-3] for t in outputs]
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        needs = [want and grad is not None for want, grad in zip(ctx.needs_input_grad[1:], grads)]
        if not any(needs):
            return None, None, None
        # A tensor without a head takes the place of what nobody asked for.
        other = grads[needs.index(True)]
        given = [
            grad if want else other.new_empty(*other.shape[:-3], tokens, 0, other.shape[-1])
            for grad, want, tokens in zip(grads, needs, ctx.tokens)
        ]
        turned = torch.ops.seal.rope(*given, *ctx.saved_tensors, **ctx.options)
        return None, *(grad if want else None for grad, want in zip(turned, needs))


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *_):
        ctx.op = call.op
        return call.run()

    @staticmethod
    def backward(ctx, *_):
        which = " (second derivatives of attention)" if ctx.op == "attention_backward" else ""
        raise NotImplementedError(f"seal::{ctx.op}: derivatives of its outputs{which} are not implemented; detach them")


def kernel(op: str):
    """The op's kernel for the dispatcher's Autograd key."""
    function, names = {
        "attention": (_Attention, DIFFERENTIABLE),
        "rope_attention": (_Attention, DIFFERENTIABLE),
        "rope": (_Rope, ("q", "k")),
    }.get(op, (_NoDerivative, None))

    def run(keyset, *args, **kwargs):
        call = _Call(op, keyset, args, kwargs)
        if not checks.differentiable(op, call.arguments):
            return call.run()
        return function.apply(call, *(call.arguments[name] for name in names or call.arguments))

    return run
