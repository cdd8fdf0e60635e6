"""Modules that treat every token by itself, run on some of them at a time: MLPs and norms of a decoder layer.

Only the module's input is kept for the backward pass, which runs it again tile by tile: what a whole MLP would keep at
once (several tensors of its inner width) is there for one tile only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .decoder import Decoder, no_dropout, offloaded

TILE = 4096  # tokens: enough rows for a matrix product to run at its full rate


class _Keeper(torch.autograd.Function):
    """Saves the module's input ahead of the module.

    A checkpoint round the layer that is recomputed up to its last saved tensor so stops before the tiles run again.
    """

    @staticmethod
    def forward(ctx, _anchor, states):
        ctx.save_for_backward(states)
        return states.new_empty(0)

    @staticmethod
    def backward(ctx, _grad):
        return None, None


class _Tiled(torch.autograd.Function):
    """``function`` of [1, N, H] over tiles of N; the gradients of ``parameters`` are added up in fp32 at least."""

    @staticmethod
    def forward(ctx, function, tile, keeper, states, *parameters):
        ctx.function, ctx.tile, ctx.keeper, ctx.parameters = function, tile, keeper, parameters
        ctx.autocast = _autocast(states.device.type)
        return _in_tiles(function, states, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.keeper is None:
            raise RuntimeError("seal_ops: a step that runs in tiles can be differentiated once only, got a second time")
        (states,) = ctx.keeper[0].grad_fn.saved_tensors
        # The engine does not come by the keeper, which would hold the layer's input until the whole graph is gone.
        ctx.keeper = None
        wanted = [p for p, want in zip(ctx.parameters, ctx.needs_input_grad[4:]) if want]
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[3] else None
        sums: list[Tensor | None] = [None] * len(wanted)
        for start in range(0, states.shape[1], ctx.tile):
            place = slice(start, start + ctx.tile)
            piece = states[:, place].detach().requires_grad_(grad_states is not None)
            with torch.enable_grad(), ctx.autocast():
                out = ctx.function(piece)
            leaves = ([piece] if grad_states is not None else []) + wanted
            found = list(torch.autograd.grad(out, leaves, grad[:, place], allow_unused=True))
            if grad_states is not None:
                first = found.pop(0)
                grad_states[:, place] = 0 if first is None else first
            for number, part in enumerate(found):
                if part is not None:
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    sums[number] = part if sums[number] is None else sums[number].add_(part)
        grads = iter(None if s is None else s.to(p.dtype) for s, p in zip(sums, wanted))
        return None, None, None, grad_states, *(next(grads) if want else None for want in ctx.needs_input_grad[4:])


def _autocast(kind: str) -> Callable:
    """The state of autocast, to be entered again."""
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext
    options = dict(dtype=torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled())
    return lambda: torch.autocast(kind, **options)


def _in_tiles(function: Callable, states: Tensor, tile: int) -> Tensor:
    out = None
    for start in range(0, states.shape[1], tile):
        piece = function(states[:, start : start + tile])
        if out is None:
            out = piece.new_empty(*states.shape[:2], piece.shape[-1])
        out[:, start : start + tile] = piece
    return out


def _flat(states: Tensor) -> Tensor:
    """[B, S, H] as one row [1, B * S, H], of which every piece is contiguous."""
    return states.reshape(1, -1, states.shape[-1]).contiguous()


def run_tiled(module: nn.Module, tile: int, forward: Callable, states: Tensor) -> Tensor:
    """``forward(states)`` of ``module``, [B, S, H], at most ``tile`` tokens of all rows together at a time."""
    rows = states.shape[:2]
    if rows.numel() <= tile:
        return forward(states)
    parameters = [p for p in module.parameters() if p.requires_grad]
    states = _flat(states)
    if not torch.is_grad_enabled() or not (states.requires_grad or parameters):
        return _in_tiles(forward, states, tile).view(*rows, -1)
    anchor = torch.empty(0, requires_grad=True, device="cpu")
    # The keeper's output lives as long as the graph: without it torch 2.11 frees what the keeper has saved.  It goes
    # in a tuple, so that it is no input of the graph.
    keeper = (_Keeper.apply(anchor, states),)
    return _Tiled.apply(forward, tile, keeper, states, *parameters).view(*rows, -1)


def candidates(decoder: Decoder) -> list[nn.Module]:
    """The children of the layers that may be tiled, for `treats_tokens_alone` to decide."""
    inside = {id(a.module) for a in decoder.attention if a is not None}
    return [
        child
        for layer in decoder.layers
        for child in layer.children()
        if not any(id(m) in inside for m in child.modules()) and no_dropout(child) and not offloaded(child)
    ]


def treats_tokens_alone(forward: Callable, args: tuple, kwargs: dict, result) -> bool:
    """Whether a module's call, of one tensor [B, S, H], gives every token what the token alone would have got."""
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(result, Tensor):
        return False
    states = args[0]
    if states.dim() != 3 or result.dim() != 3 or result.shape[:2] != states.shape[:2] or states.shape[1] < 2:
        return False
    try:  # tiles that are no halves, so that what looks at neighbours or at the length shows
        parts = _in_tiles(forward, _flat(states), max(1, states.shape[:2].numel() // 3))
    except Exception:  # a module that wants all tokens
        return False
    error = (parts.double().view(result.shape) - result.double()).norm()
    return bool(error <= 32 * torch.finfo(result.dtype).eps * result.double().norm())
