"""One query a row over a cache that holds more than the query may see: padding before its keys, room behind them.

A step on a static cache or of a batch padded on the left sees one run of keys a row.  The fused op takes runs of keys
as packed sequences, whose boundaries it reads on the device: every head of keys of every row is a sequence with one
token of queries, and what lies between two of them, padding and room, is a sequence without a query.  No length reaches
the host, so a CUDA graph of such a step stays right while the cache fills.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..ops.factors import full_view
from ..ops.functional import attention

# Off until it has run on a GPU.  On a CPU PyTorch's SDPA with a mask is as good: no second processor is kept busy.
DEVICES = {"cuda"} if os.environ.get("SEAL_FUSED_STEPS", "0") == "1" else set()
_MOST_TOKENS = 2**31 - 1  # of a call


def describe() -> str:
    """Whether such steps run fused, for `seal env`."""
    return "on a GPU (SEAL_FUSED_STEPS=1)" if "cuda" in DEVICES else "off (SEAL_FUSED_STEPS=1 turns them on)"


def key_ranges(
    batch: int, keys: int, kv_offset: int, q_offset: int | Tensor, padding: Tensor | None, config, device
) -> Tensor | None:
    """The mask of one query a row, at the position ``q_offset``, over ``keys`` keys from ``kv_offset`` on.

    int32 [1, 1, 2, 2 N + 2] for the N = B * Hkv sequences of the packed call, and the N + 1 gaps before, between and
    behind them: ``cu_seqlens`` of the queries, and of the keys.  A mask of one query never has two rows of queries, so
    nobody's own is taken for this.  ``padding`` bool [B, tokens seen].

    None where the call is not for the fused op: on another device, where a row has holes, while a CUDA graph is
    recorded with padding to be read, or where the config does not say how many heads the keys have.
    """
    heads = _kv_heads(config)
    device = torch.device(device)
    if device.type not in DEVICES or heads is None or batch * heads * keys > _MOST_TOKENS:
        return None
    if padding is None:
        first = torch.zeros(batch, dtype=torch.int32, device=device)
        end = torch.zeros_like(first) + (q_offset + 1 - kv_offset)
    else:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        real = padding[:, kv_offset : kv_offset + keys]
        place = torch.arange(real.shape[1], device=device)
        real = real.to(device, torch.bool) & (place <= q_offset - kv_offset)
        first = real.int().argmax(1)
        end = real.shape[1] - real.flip(1).int().argmax(1)
        if bool((end - first != real.sum(1)).any()):
            return None
    count = batch * heads
    start = torch.arange(count, device=device) * keys
    begins, ends = (start + t.repeat_interleave(heads) for t in (first, end))
    of_keys = torch.stack([begins, ends], 1).flatten()
    number = torch.arange(count + 1, device=device)
    of_queries = torch.stack([number, number], 1).flatten()  # 0, 0, 1, 1, ..., N, N
    edges = torch.arange(2, device=device) * (count * keys)  # 0 and the last, made on the device
    return torch.cat([of_queries, edges[:1], of_keys, edges[1:]]).int().view(1, 1, 2, -1)


def _kv_heads(config) -> int | None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def is_ranges(mask: Tensor, queries: int) -> bool:
    """Whether a mask is what `key_ranges` makes."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[:3] == (1, 1, 2) and queries == 1


def as_tensor(ranges: Tensor, batch: int, keys: int) -> Tensor:
    """The boolean mask [B, 1, 1, keys]."""
    of_keys = ranges[ranges.shape[0] // 2 :]
    heads = (of_keys.shape[0] - 2) // 2 // batch
    start = torch.arange(batch, device=ranges.device) * (heads * keys)
    first, end = (of_keys[at : -1 : 2 * heads][:batch] - start for at in (1, 2))
    place = torch.arange(keys, device=ranges.device)
    return ((place >= first[:, None]) & (place < end[:, None]))[:, None, None]


def fits(ranges: Tensor, q: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes q [B, 1, Hq, D] and a cache's key and value [B, Hkv, S, D], which it does not copy."""
    count = (ranges.shape[0] // 2 - 2) // 2
    return (
        count == key.shape[0] * key.shape[1]
        and key.shape == value.shape
        and key.is_contiguous()
        and value.is_contiguous()
        and q.dtype == key.dtype == value.dtype
    )


def attend(
    ranges: Tensor,
    q: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor | None,
    softmax_scale: float | None,
    backend: str | None,
    softcap: float | None = None,
) -> Tensor:
    """The fused op on one query a row; q [B, 1, Hq, D], key and value [B, Hkv, S, D]; returns [B, 1, Hq, D]."""
    batch, heads, keys, channels = key.shape
    count, group = batch * heads, q.shape[2] // heads
    if scale is not None:
        scale = full_view(scale, q.shape[2], channels)
        scale = scale.expand(batch, -1, -1).reshape(count, group, -1)
        scale = torch.cat([scale.repeat_interleave(2, 0), scale[-1:]])  # a gap's is read by no query
    half = ranges.shape[0] // 2
    out = attention(
        q.reshape(count, group, channels),
        key.view(count * keys, 1, channels),
        value.view(count * keys, 1, channels),
        scale,
        softmax_scale=softmax_scale,
        causal=False,
        cu_seqlens=ranges[:half],
        cu_seqlens_k=ranges[half:],
        max_seqlen=1,
        softcap=softcap,
        backend=backend,
    )
    return out.view(batch, 1, heads * group, channels)
