"""What the model behind the masks was called with: what transformers does not tell the maker of a mask.

A hook on the module that makes the masks sees the call.  Two things are lost without it.  With a cache, transformers
does not look for packed rows in the positions.  While torch.compile traces the whole model, or a CUDA graph records it,
it cannot look into tensors and takes every call without a mask for packed rows, although what the caller gave is known
without looking.
"""

from __future__ import annotations

import inspect
import typing

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .documents import begins_by_position, boundaries
from .model_parallel import ulysses


def is_recorded() -> bool:
    """Whether torch.compile or torch.export traces the call, or a CUDA graph takes it down: no value can be read."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _TracedCall:
    """The call that is being traced.

    ``config``: of the module that makes the masks; None between calls, and where a mask was given.  ``unpadded``: the
    mask of ones is the hook's.  ``position_ids``: those whose restarts nobody has looked for.
    """

    config: object | None = None
    unpadded: bool = False
    position_ids: Tensor | None = None


_TRACED = _TracedCall()


def traced_call(config) -> _TracedCall | None:
    """What the call that is being traced was given, for a mask that is made with ``config``; None where unknown."""
    return _TRACED if _TRACED.config is config else None


def _look(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The forward pre-hook: the call with what it did not say."""
    tracing = is_recorded()
    if tracing:
        _TRACED.config = None
    if len(args) > 1 or kwargs.get("attention_mask") is not None:
        return None
    positions, lengths = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    if tracing:
        return _note(module, args, kwargs, positions if lengths is None else None)
    if positions is None or lengths is not None or positions.dim() != 2 or positions.shape[1] < 2:
        return None
    cache, use_cache = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("use_cache")
    if cache is None and not (getattr(module.config, "use_cache", False) if use_cache is None else use_cache):
        return None  # transformers looks itself
    if ulysses.place() is not None:
        return None  # these are one process' tokens; positions are read when all are together
    if cache is not None and int(cache.get_seq_length()) > 0:
        return None
    begins = begins_by_position(positions, _given(args, kwargs).shape[0])
    # What torch.jit.trace is shown need not hold for its later calls: there boundaries are given in any case.
    if not torch.jit.is_tracing() and not bool(begins[:, 1:].any()):
        return None
    found = boundaries(begins)
    return args, {**kwargs, "cu_seq_lens_q": found, "cu_seq_lens_k": found}


def _given(args: tuple, kwargs: dict) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return kwargs.get("inputs_embeds") if ids is None else ids


def _note(module: nn.Module, args: tuple, kwargs: dict, positions: Tensor | None) -> tuple[tuple, dict] | None:
    """Notes a traced call without a mask; one without documents to find gets a mask of ones."""
    _TRACED.config, _TRACED.unpadded, _TRACED.position_ids = module.config, positions is None, positions
    given = _given(args, kwargs)
    if positions is not None or given is None or kwargs.get("cache", kwargs.get("past_key_values")) is not None:
        return None
    return args, {**kwargs, "attention_mask": given.new_ones(given.shape[:2], dtype=torch.bool)}


def _forget(module: nn.Module, args: tuple, output) -> None:
    """The forward hook."""
    if is_recorded():
        _TRACED.config = _TRACED.position_ids = None


def maker_of_masks(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The innermost transformers model in ``model`` that holds all the modules called ``names``: where their masks are
    made.  None where it does not hand arguments on to them."""
    common = []
    for step in zip(*(name.split(".") for name in names)):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    for size in range(len(common), -1, -1):
        module = model.get_submodule(".".join(common[:size]))
        if isinstance(module, PreTrainedModel):
            arguments = _arguments(module)
            takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in arguments.values())
            return module if takes_any and "attention_mask" in arguments else None
    return None


def _arguments(module: nn.Module) -> typing.Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return {}


def watch(module: nn.Module) -> None:
    """Puts the hooks on a module."""
    module.register_forward_pre_hook(_look, with_kwargs=True)
    module.register_forward_hook(_forget)


def unwatch(module: nn.Module) -> None:
    """Takes the hooks of `watch` off, also from a copy of the module."""
    for hooks, flags, ours in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _look),
        (module._forward_hooks, module._forward_hooks_with_kwargs, _forget),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            flags.pop(key, None)
