"""DeepSpeed's Ulysses (arXiv 2309.14509): each process holds a share of the tokens, and attends with a share of the
heads to all of them.

DeepSpeed lays a function round the entry of transformers' attention registry.  It gathers the tokens, keeps this
process' heads, drops the mask and hands over the gathered position ids; so the rotation must have been done before, and
what the mask said must be in the positions.
"""

from __future__ import annotations

import sys
import typing

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...utils.compiling import constant

if typing.TYPE_CHECKING:
    from ..masks import CallMask

_STATE = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
_OURS = f"{__package__.rpartition('.')[0]}.attention"
# What a mask function may be made of: all of it is found in the positions again.
_KNOWN = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "and_masks.<locals>.and_mask",
}


# A compiled model would be compiled anew after every import elsewhere: sys.modules is another then.
@constant
def place() -> tuple[int, int] | None:
    """(number of this process, how many) among those that share the tokens of a sequence; None without Ulysses."""
    state = sys.modules.get(_STATE)
    if getattr(state, "_SEQUENCE_PARALLEL_GROUP", None) is None:
        return None
    return state.get_sequence_parallel_rank(), state.get_sequence_parallel_world_size()


def is_on(name: str) -> bool:
    """Whether the processes share the tokens of a model whose attention is registered under ``name``.

    Raises:
        RuntimeError: they share tokens, but the exchange stands round another attention.
    """
    if place() is None:
        return False
    if ALL_ATTENTION_FUNCTIONS[name].__module__ == _OURS:
        raise RuntimeError(
            f"seal_ops: DeepSpeed's sequence parallelism must be registered with core_attn_implementation={name!r} for "
            f"a model with scales, got another one, which would leave each process with its own tokens"
        )
    return True


def gatherable(kwargs: dict) -> dict:
    """Arguments of an attention module, with ``position_ids`` that NCCL gathers: it takes no part of a larger tensor,
    such as a process' columns of a batch."""
    positions = kwargs.get("position_ids")
    return kwargs if positions is None else {**kwargs, "position_ids": positions.contiguous()}


def check_mask(mask_function, padding: Tensor | None, local_size: int | None, config) -> None:
    """Raises ValueError for a mask that is lost when DeepSpeed drops it.

    ``padding`` bool [B, tokens] of this process' tokens.  Padding on the right is harmless under a causal mask.
    """
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise ValueError(
            f"seal_ops: a model under sequence parallelism must have causal or sliding-window attention, got one in "
            f"chunks of {local_size} tokens, which DeepSpeed drops"
        )
    unknown = _parts(mask_function) - _KNOWN
    if unknown:
        raise ValueError(
            f"seal_ops: a model under sequence parallelism must have a causal mask, a sliding window or packed rows, "
            f"got {', '.join(sorted(unknown))}, which DeepSpeed drops"
        )
    if padding is None or bool(padding.all()):
        return
    rank = (place() or (0, 1))[0]
    begins = padding[:, 0] | (~padding.any(1) if rank > 0 else False)
    if not bool(begins.all()) or bool((padding[:, 1:] & ~padding[:, :-1]).any()):
        raise ValueError(
            "seal_ops: rows under sequence parallelism must be padded on the right (DeepSpeed drops the mask), got "
            "padding before a token"
        )


def _parts(mask_function) -> set[str]:
    """The qualified names of a mask function and of those in its closure."""
    names, waiting = set(), [mask_function]
    while waiting:
        function = waiting.pop()
        names.add(getattr(function, "__qualname__", type(function).__name__))
        for cell in getattr(function, "__closure__", None) or ():
            content = cell.cell_contents
            content = content if isinstance(content, tuple) else (content,)
            waiting += [item for item in content if callable(item) and not isinstance(item, Tensor)]
    return names


def with_positions(mask: CallMask, position_ids: Tensor | None, queries: int) -> CallMask:
    """The mask, with the documents of packed rows told apart where ``position_ids`` [B, S] do not go up by one."""
    if position_ids is None or queries != mask.keys or mask.cu_seqlens is not None:
        return mask
    if position_ids.dim() != 2 or position_ids.shape[1] != queries:
        raise ValueError(
            f"seal_ops: position_ids under sequence parallelism must have shape [B, {queries}], got "
            f"{list(position_ids.shape)}"
        )
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    if not bool(begins[:, 1:].any()):
        return mask
    starts = begins.flatten().nonzero().squeeze(1)
    return mask._replace(cu_seqlens=torch.cat([starts, starts.new_full((1,), begins.numel())]).int())
