"""Masks, from transformers' mask registry to the attention call.

What the mask registry returns travels through model code that expects None or a tensor of four dimensions, and
`generate` calls .contiguous() on it.  A mask that is only structure is therefore sent as an *empty* tensor whose sizes
are the description, [kind, window, 0, keys]; a padded batch as the int32 row [1, 1, 1, T + B + 2] that lists the T real
tokens, the B + 1 sequence boundaries and the window (0: none); the documents of packed rows as the int32 rows [1, 2, 1,
documents + 1] of their boundaries and the window; the one query of a step of decoding, where its keys are not simply
all, as the int32 rows of `decoding.key_ranges`; anything else as the boolean mask of torch's SDPA.

While a whole model is traced by torch.compile, or recorded as a CUDA graph, sizes may not depend on the padding: a
padded batch is then the row of all B * S tokens, in every batch row the real ones first, and the 2 B + 1 boundaries
between real tokens and padding.  torch.jit.trace keeps the sizes of its example, so all of its masks are boolean.
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
from . import decoding
from .call_arguments import is_recorded, traced_call
from .documents import begins_by_number, begins_by_position, boundaries, noticed_documents, same_document
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
    return _with_window(row[None, None, None], window)


def _with_window(row: Tensor, window: int | None) -> Tensor:
    row._seal_window = window or 0  # spares a GPU the read; lost where the row is copied to another device
    return row


def _traced_packing(padding: Tensor) -> Tensor:
    """`_packing` of a traced batch without a window: the padding of a row is a sequence, too, behind its real
    tokens."""
    batch, length = padding.shape
    order = torch.sort((~padding).int(), dim=1, stable=True)[1]
    tokens = order + length * torch.arange(batch, device=padding.device)[:, None]
    ends = length * torch.arange(1, batch + 1, device=padding.device)
    both = torch.stack([ends - length + padding.sum(1), ends], 1).flatten()
    return torch.cat([tokens.flatten(), both.new_zeros(1), both, both.new_zeros(1)]).int()[None, None, None]


def _documents(numbers: Tensor, window: int | None) -> Tensor:
    """The rows of documents numbered [B, S]."""
    row = boundaries(begins_by_number(numbers))
    return _with_window(torch.stack([row, row.new_full(row.shape, window or 0)])[None, :, None], window)


def _is_documents(mask: Tensor, queries: int) -> bool:
    return mask.dtype == torch.int32 and mask.shape[:3] == (1, 2, 1) and queries > 1


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
    without padding, and a padded batch or packed rows without a cache, become descriptions for the fused op; a pattern
    that is not proven to be one of these becomes the boolean mask [B, 1, Sq, Sk].
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
    if torch.jit.is_tracing():  # a value that is read, or a size that is compared, would hold for all later calls
        return dense()
    compiling = is_recorded()
    traced = traced_call(config) if compiling else None
    if traced is not None and traced.unpadded:
        attention_mask = None
    if q_length == 1 and mask_function is causal_mask_function and local_size is None and isinstance(q_offset, Tensor):
        row = None
        if not compiling or attention_mask is None:  # reading the padding would break the graph
            row = decoding.key_ranges(batch_size, kv_length, kv_offset, q_offset, attention_mask, config, device)
        return dense() if row is None else row
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        if compiling and attention_mask is not None:
            return dense()  # reading the padding would break the graph
        whole = attention_mask is None or bool(attention_mask.all())
        return _structure(_FULL, None, kv_length, device) if whole else dense()
    window = None
    if local_size is not None:  # distinguish sliding and chunked
        if local_size != getattr(config, "sliding_window", None) or local_size == getattr(
            config, "attention_chunk_size", None
        ):
            return dense()
        window = local_size
    if not allow_is_causal_skip:  # packed rows, custom patterns, compiled decoding
        numbers = None if compiling else noticed_documents(mask_function, config)
        return dense() if numbers is None else _documents(numbers, window)
    # The flag says that no extra mask was combined.
    if window is None and mask_function is not causal_mask_function:
        return dense()
    if traced is not None and traced.position_ids is not None:
        return dense() if kv_length != q_length else dense() & _same_traced_document(traced.position_ids, batch_size)
    if isinstance(q_offset, Tensor):  # a static cache counts on the device
        if compiling or q_length == 1:
            return dense()
        q_offset = int(q_offset)
    keys = q_offset + q_length - kv_offset  # filled; a static cache is longer
    if not q_length <= keys <= kv_length:
        return dense()
    # Not in an export, whose lengths a comparison would bound.
    if window is not None and not torch.compiler.is_exporting() and window >= keys:
        window = None
    if attention_mask is not None:
        if attention_mask.shape[1] < kv_offset + keys:
            return dense()
        padding = attention_mask[:, kv_offset : kv_offset + keys]
        if compiling:
            return _traced_packing(padding) if keys == q_length > 1 and window is None else dense()
        if not bool(padding.all()):
            row = None
            if keys == q_length > 1:
                row = _packing(padding, window)
            elif q_length == 1 and window is None:
                row = decoding.key_ranges(batch_size, kv_length, kv_offset, q_offset, attention_mask, config, device)
            return dense() if row is None else row
    return _structure(_CAUSAL, window, keys, device)


def _same_traced_document(position_ids: Tensor, batch: int) -> Tensor:
    """Boolean [B, 1, S, S]: whether positions [B or 1, S] do not restart between two tokens."""
    numbers = begins_by_position(position_ids, batch).cumsum(1)[:, None]
    return numbers[..., :, None] == numbers[..., None, :]


class CallMask(typing.NamedTuple):
    """A mask as the attention call needs it: the first ``keys`` keys are real, and one of four more precise terms.

    ``cu_seqlens`` [sequences + 1] divides the tokens of the batch, laid end to end, into sequences; with ``tokens``
    [T], indices into B * S, only these: the real tokens of a padded batch.  ``max_seqlen``: no sequence is longer.
    ``in_rows``: no sequence goes beyond its batch row.  ``padding_too``: ``tokens`` are all, and the padding of each
    row is a sequence behind that of its real ones.  ``dense``: boolean or additive, [B, 1, Sq, Sk].
    ``ranges``: of one query a row, as `decoding.key_ranges` makes them.
    """

    causal: bool
    window: int | None
    keys: int
    tokens: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dense: Tensor | None = None
    max_seqlen: int | None = None
    in_rows: bool = False
    padding_too: bool = False
    ranges: Tensor | None = None

    def real_in_order(self, batch: int) -> Tensor:
        """Boolean [B, S]: which of ``tokens``, as they are listed, are real, where ``padding_too``."""
        lengths = (self.cu_seqlens[1::2] - self.cu_seqlens[:-1:2])[:, None]
        return torch.arange(self.keys, device=lengths.device) < lengths


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
    if _is_documents(mask, queries):
        return CallMask(True, _window_of(mask), queries, None, mask[0, 0, 0], None, queries, True)
    if _is_packing(mask, queries):
        row = mask[0, 0, 0]
        if row.shape[0] == batch * queries + 2 * batch + 2:  # more than a batch with padding has of `_packing`
            cu_seqlens = row[batch * queries : -1]
            return CallMask(True, None, queries, row[: batch * queries], cu_seqlens, None, queries, padding_too=True)
        return CallMask(True, _window_of(mask), queries, row[: -batch - 2], row[-batch - 2 : -1], None, queries)
    if decoding.is_ranges(mask, queries):
        return CallMask(False, None, keys, ranges=mask.flatten())
    if mask.dtype != torch.bool and not mask.is_floating_point():  # PyTorch would add its ones and zeros to the scores
        raise ValueError(
            f"seal_ops: {type(module).__name__} must be given a boolean or an additive mask of four dimensions, got "
            f"one of {mask.dtype}"
        )
    return CallMask(False, None, keys, dense=mask)


def _window_of(mask: Tensor) -> int | None:
    window = mask._seal_window if hasattr(mask, "_seal_window") else int(mask[0, -1, 0, -1])
    return window or None


def with_documents(
    mask: CallMask,
    module: nn.Module,
    q: Tensor,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None = None,
) -> CallMask:
    """The mask, with the documents of packed rows told apart where the caller says where they begin.

    ``cu_seq_lens_q`` int32 [documents + 1], as the collators of transformers and TRL give it: boundaries in the tokens
    of q [B, S, Hq, D], laid end to end; ``max_length_q``: no document is longer.  Documents found in the positions give
    way.  Raises ValueError with keys from a cache.
    """
    if cu_seq_lens_q is None:
        return mask
    batch, length = q.shape[:2]
    if mask.keys != length or (cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape):
        raise ValueError(
            f"seal_ops: {type(module).__name__} must be given cu_seq_lens_q for queries and keys alike, got "
            f"{length} queries and {mask.keys} keys"
        )
    cu_seqlens = cu_seq_lens_q.to(q.device, torch.int32)
    if mask.dense is None and mask.tokens is None:
        return mask._replace(
            cu_seqlens=cu_seqlens,
            max_seqlen=None if max_length_q is None else int(max_length_q),
            in_rows=batch == 1,
        )
    same = same_document(cu_seqlens, batch, length)
    seen = as_tensor(mask, q)
    if seen.dtype == torch.bool:
        return CallMask(False, None, mask.keys, dense=seen & same)
    return CallMask(False, None, mask.keys, dense=seen.masked_fill(~same, torch.finfo(seen.dtype).min))


def as_tensor(mask: CallMask, q: Tensor) -> Tensor | None:
    """The mask as a tensor, for q [B, Sq, Hq, D]; None where every query sees every key."""
    if mask.dense is not None:
        return mask.dense
    if mask.ranges is not None:
        return decoding.as_tensor(mask.ranges, q.shape[0], mask.keys)
    batch, length = q.shape[:2]
    seen = None
    if mask.causal:  # only causal masks come with a window
        seen = Visibility.of(mask.causal, mask.window).allowed(length, mask.keys, device=q.device)[0]
    if mask.tokens is not None:
        real, tokens = torch.zeros(batch * length, dtype=torch.bool, device=q.device), mask.tokens.long()
        if mask.padding_too:
            real = real.index_copy(0, tokens, mask.real_in_order(batch).flatten())
        else:
            real = real.index_fill(0, tokens, True)
        return seen & real.view(batch, 1, 1, -1)
    if mask.cu_seqlens is not None:
        same = same_document(mask.cu_seqlens, batch, length)
        return same if seen is None else seen & same
    return seen


AttentionMaskInterface.register(NAME, attention_mask)
AttentionMaskInterface.register(PLAIN, attention_mask)
