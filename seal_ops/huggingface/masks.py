"""Masks, from transformers' mask registry to the attention call.

What the mask registry returns travels through model code that expects None or a tensor of four dimensions, and `generate`
calls .contiguous() on it.  A mask that is only structure is therefore sent as an *empty* tensor whose sizes are the
description, [kind, window, 0, keys]; a padded batch as the int32 row [1, 1 + window, 1, T + B + 1] that lists the T real
tokens and the B + 1 sequence boundaries; anything else as the boolean mask of torch's SDPA.
"""
from __future__ import annotations

import typing

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from ..ops import masks

NAME = "seal"  # in both registries; transformers reserves "/" and "|"
# --------------------------------------------------------------------------------------------------------------------
# Masks.  What the mask registry returns travels through model code that expects None or a tensor of four dimensions,
# and `generate` calls .contiguous() on it.  A mask that is only structure is therefore sent as an *empty* tensor whose
# sizes are the description, [kind, window, 0, keys]; a padded batch as the int32 row [1, 1 + window, 1, T + B + 1]
# that lists the T real tokens and the B + 1 sequence boundaries; anything else as the boolean mask of torch's SDPA.
# --------------------------------------------------------------------------------------------------------------------
_CAUSAL, _FULL = 1, 2


def _structure(kind: int, window: int | None, keys: int, device) -> Tensor:
    return torch.empty((kind, window or 0, 0, keys), dtype=torch.bool, device=device)


def _is_structure(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[2] == 0


def _is_packing(mask: Tensor) -> bool:
    return mask.dtype == torch.int32


def _packing(padding: Tensor, window: int | None) -> Tensor | None:
    """The real tokens of a padded batch (``padding`` bool [B, S]) as indices into B * S, then cu_seqlens.

    None where a windowed row has a hole: packing would bring its tokens nearer to each other than they are.
    """
    lengths = padding.sum(1)
    if window is not None:
        first, from_last = padding.int().argmax(1), padding.flip(1).int().argmax(1)
        if bool((padding.shape[1] - from_last - first != lengths)[lengths > 0].any()):
            return None
    tokens = padding.flatten().nonzero().squeeze(1)
    row = torch.cat([tokens, lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return row[None, None, None].expand(1, 1 + (window or 0), 1, -1)


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
                   mask_function=causal_mask_function, attention_mask: Tensor | None = None,
                   local_size: int | None = None, allow_is_causal_skip: bool = True,
                   allow_is_bidirectional_skip: bool = False, config=None, device="cpu", **kwargs) -> Tensor:
    """The entry of transformers' mask registry; arguments as transformers documents them for ``sdpa_mask``.

    ``attention_mask`` is the boolean padding mask [B, tokens seen].  A causal mask (with or without a sliding window)
    without padding, and a padded batch without a cache, become descriptions for the fused op; a pattern that is not
    proven to be one of these becomes the boolean mask [B, 1, Sq, Sk].
    """
    def dense() -> Tensor:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                         kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                         local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
                         config=config, device=device, **kwargs)

    compiling = torch.compiler.is_compiling()
    if compiling and attention_mask is not None:
        return dense()  # reading the padding would break the graph
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        whole = attention_mask is None or bool(attention_mask.all())
        return _structure(_FULL, None, kv_length, device) if whole else dense()
    if not allow_is_causal_skip:
        return dense()  # packed rows, custom patterns, compiled decoding
    # The flag says that nothing was laid over the mask; what is left to tell apart is causal, sliding and chunked.
    window = None
    if local_size is not None:
        if local_size != getattr(config, "sliding_window", None) or local_size == getattr(
                config, "attention_chunk_size", None):
            return dense()
        window = local_size
    elif mask_function is not causal_mask_function:
        return dense()
    if isinstance(q_offset, Tensor):  # a static cache counts on the device
        if compiling or q_length == 1:
            return dense()
        q_offset = int(q_offset)
    keys = q_offset + q_length - kv_offset  # filled; a static cache is longer
    if not q_length <= keys <= kv_length:
        return dense()
    if window is not None and window >= keys:
        window = None
    if attention_mask is not None:
        if attention_mask.shape[1] < kv_offset + keys:
            return dense()
        padding = attention_mask[:, kv_offset:kv_offset + keys]
        if not bool(padding.all()):
            packing = _packing(padding, window) if keys == q_length > 1 else None
            return dense() if packing is None else packing
    return _structure(_CAUSAL, window, keys, device)


class CallMask(typing.NamedTuple):
    """A mask as the attention call needs it: the first ``keys`` keys are real, and one of three more precise terms."""
    causal: bool
    window: int | None
    keys: int
    packing: Tensor | None = None  # the T real tokens of a padded batch, then B + 1 boundaries
    dense: Tensor | None = None  # boolean or additive, [B, 1, Sq, Sk]


def read_mask(module: nn.Module, mask: Tensor | None, queries: int, keys: int, sliding_window: int | None,
               is_causal: bool | None) -> CallMask:
    """What the mask argument of an attention call says."""
    if mask is None:  # not from `attention_mask`: the module was called by itself
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries != keys:  # aligned to the start (SDPA) or to the end (flash-attn)?
            raise ValueError(f"seal_ops: {type(module).__name__} must be given a mask where {queries} queries meet {keys} "
                             f"keys, got None, which does not say which keys they may see")
        return CallMask(causal, sliding_window if causal else None, keys)
    if _is_structure(mask):
        return CallMask(mask.shape[0] == _CAUSAL, mask.shape[1] or None, mask.shape[3])
    if _is_packing(mask):
        return CallMask(True, mask.shape[1] - 1 or None, queries, packing=mask[0, 0, 0])
    return CallMask(False, None, keys, dense=mask)


def split_packing(packing: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The indices [T] of the real tokens in B * S, and cu_seqlens [B + 1]."""
    return packing[:-batch - 1], packing[-batch - 1:]


def as_tensor(mask: CallMask, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a tensor; None where every query sees every key."""
    if mask.dense is not None or not mask.causal:  # only causal masks come with a window
        return mask.dense
    seen = masks.allowed(q.shape[1], k.shape[1], *masks.bounds(mask.causal, mask.window), device=q.device)
    if mask.packing is None:
        return seen
    tokens, _ = split_packing(mask.packing, q.shape[0])
    real = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.bool, device=q.device).index_fill(0, tokens.long(), True)
    return seen & real.view(q.shape[0], 1, 1, -1)


AttentionMaskInterface.register(NAME, attention_mask)
