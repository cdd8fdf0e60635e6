"""Masks, from transformers' mask registry to the attention call.

What the mask registry returns travels through model code that expects None or a tensor of four dimensions, and
`generate` calls .contiguous() on it.  A mask that is only structure is therefore sent as an *empty* tensor whose sizes
are the description, [kind, window, 0, keys]; a padded batch as the int32 row [1, 1, 1, T + B + 2] that lists the T real
tokens, the B + 1 sequence boundaries and the window (0: none); anything else as the boolean mask of torch's SDPA.
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

from ..ops.visibility import Visibility
from .model_parallel import ulysses

NAME = "seal"  # in both registries; transformers reserves "/" and "|"
PLAIN = "seal_plain"  # the same attention for a model without scales
_CAUSAL, _FULL = 1, 2


def _structure(kind: int, window: int | None, keys: int, device) -> Tensor:
    return torch.empty((kind, window or 0, 0, keys), dtype=torch.bool, device=device)


def _is_structure(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[2] == 0


def _is_packing(mask: Tensor, queries: int) -> bool:
    return mask.dtype == torch.int32 and mask.shape[:3] == (1, 1, 1) and queries > 1


def _packing(padding: Tensor, window: int | None) -> Tensor | None:
    """The real tokens of a padded batch (``padding`` bool [B, S]) as indices into B * S, then cu_seqlens, then the
    window.

    None where a windowed row has a hole: packing would bring its tokens nearer to each other than they are.
    """
    lengths = padding.sum(1)
    if window is not None:
        first, from_last = padding.int().argmax(1), padding.flip(1).int().argmax(1)
        if bool((padding.shape[1] - from_last - first != lengths)[lengths > 0].any()):
            return None
    tokens = padding.flatten().nonzero().squeeze(1)
    row = torch.cat([tokens, lengths.new_zeros(1), lengths.cumsum(0), lengths.new_full((1,), window or 0)]).int()
    row = row[None, None, None]
    row._seal_window = window or 0  # spares a GPU the read; lost where the row is copied to another device
    return row


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config=None,
    device="cpu",
    **kwargs,
) -> Tensor | None:
    """The entry of transformers' mask registry; arguments as transformers documents them for ``sdpa_mask``.

    ``attention_mask`` is the boolean padding mask [B, tokens seen].  A causal mask (with or without a sliding window)
    without padding, and a padded batch without a cache, become descriptions for the fused op; a pattern that is not
    proven to be one of these becomes the boolean mask [B, 1, Sq, Sk].
    """

    def dense() -> Tensor:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            config=config,
            device=device,
            **kwargs,
        )

    if ulysses.is_on(NAME):
        ulysses.check_mask(mask_function, attention_mask, local_size, config)
        return None  # DeepSpeed would drop it
    compiling = torch.compiler.is_compiling()
    if compiling and attention_mask is not None:
        return dense()  # reading the padding would break the graph
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        whole = attention_mask is None or bool(attention_mask.all())
        return _structure(_FULL, None, kv_length, device) if whole else dense()
    if not allow_is_causal_skip:
        return dense()  # packed rows, custom patterns, compiled decoding
    # The flag says that no extra mask was combined; distinguish causal, sliding and chunked.
    window = None
    if local_size is not None:
        if local_size != getattr(config, "sliding_window", None) or local_size == getattr(
            config, "attention_chunk_size", None
        ):
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
        padding = attention_mask[:, kv_offset : kv_offset + keys]
        if not bool(padding.all()):
            packing = _packing(padding, window) if keys == q_length > 1 else None
            return dense() if packing is None else packing
    return _structure(_CAUSAL, window, keys, device)


class CallMask(typing.NamedTuple):
    """A mask as the attention call needs it: the first ``keys`` keys are real, and one of three more precise terms.

    ``cu_seqlens`` [sequences + 1] divides the tokens of the batch, laid end to end, into sequences; with ``tokens``
    [T], indices into B * S, only these (the real tokens of a padded batch).  ``dense``: boolean or additive, [B, 1, Sq,
    Sk].
    """

    causal: bool
    window: int | None
    keys: int
    tokens: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dense: Tensor | None = None


def read_mask(
    module: nn.Module,
    mask: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    sliding_window: int | None,
    is_causal: bool | None,
) -> CallMask:
    """What the mask argument of an attention call says."""
    if mask is None:  # not from `attention_mask`: the module was called by itself
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries != keys:  # aligned to the start (SDPA) or to the end (flash-attn)?
            raise ValueError(
                f"seal_ops: {type(module).__name__} must be given a mask where {queries} queries meet {keys} "
                f"keys, got None, which does not say which keys they may see"
            )
        return CallMask(causal, sliding_window if causal else None, keys)
    if _is_structure(mask):
        # A full mask is as good as none: where a model made it without its cache (BERT as a decoder), it counts too few
        # keys.
        causal = mask.shape[0] == _CAUSAL
        return CallMask(causal, mask.shape[1] or None, mask.shape[3] if causal else keys)
    if _is_packing(mask, queries):
        row = mask[0, 0, 0]
        window = mask._seal_window if hasattr(mask, "_seal_window") else int(row[-1])
        return CallMask(True, window or None, queries, row[: -batch - 2], row[-batch - 2 : -1])
    return CallMask(False, None, keys, dense=mask)


def with_documents(
    mask: CallMask, module: nn.Module, q: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None
) -> CallMask:
    """The mask, with the documents of packed rows told apart where the caller says where they begin.

    ``cu_seq_lens_q`` int32 [documents + 1], as transformers' DataCollatorWithFlattening gives it: boundaries in the
    tokens of q [B, S, Hq, D], laid end to end.  Raises ValueError with keys from a cache.
    """
    if cu_seq_lens_q is None:
        return mask
    if mask.keys != q.shape[1] or (cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape):
        raise ValueError(
            f"seal_ops: {type(module).__name__} must be given cu_seq_lens_q for queries and keys alike, got "
            f"{q.shape[1]} queries and {mask.keys} keys"
        )
    cu_seqlens = cu_seq_lens_q.to(q.device, torch.int32)
    if mask.dense is None and mask.tokens is None:
        return mask._replace(cu_seqlens=cu_seqlens)
    same = _same_document(cu_seqlens, *q.shape[:2])
    seen = as_tensor(mask, q)
    if seen.dtype == torch.bool:
        return CallMask(False, None, mask.keys, dense=seen & same)
    return CallMask(False, None, mask.keys, dense=seen.masked_fill(~same, torch.finfo(seen.dtype).min))


def _same_document(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Boolean [B, 1, S, S]: whether two tokens lie in one sequence of the batch's B * S tokens."""
    tokens = torch.arange(batch * length, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, tokens, right=True).view(batch, 1, length)
    return document[..., :, None] == document[..., None, :]


def as_tensor(mask: CallMask, q: Tensor) -> Tensor | None:
    """The mask as a tensor, for q [B, Sq, Hq, D]; None where every query sees every key."""
    if mask.dense is not None:
        return mask.dense
    batch, length = q.shape[:2]
    seen = None
    if mask.causal:  # only causal masks come with a window
        seen = Visibility.of(mask.causal, mask.window).allowed(length, mask.keys, device=q.device)[0]
    if mask.tokens is not None:
        real = torch.zeros(batch * length, dtype=torch.bool, device=q.device).index_fill(0, mask.tokens.long(), True)
        return seen & real.view(batch, 1, 1, -1)
    if mask.cu_seqlens is not None:
        same = _same_document(mask.cu_seqlens, batch, length)
        return same if seen is None else seen & same
    return seen


AttentionMaskInterface.register(NAME, attention_mask)
AttentionMaskInterface.register(PLAIN, attention_mask)
