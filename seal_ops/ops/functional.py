"""What users call: `attention`, `rope`, `rope_attention` and `packed_positions`. docs/ops.md is the contract."""
from __future__ import annotations

import torch
from torch import Tensor

from .registration import _seal

# What users call.

def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None = None, offset: Tensor | None = None, *,
              softmax_scale: float | None = None, causal: bool = True, window: int | None = None,
              cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen: int | None = None,
              max_seqlen_k: int | None = None, deterministic: bool | None = None, backend: str | None = None,
              return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`scale * softmax(softmax_scale * q k^T + mask) v + offset`, fused; differentiable in q, k, v, scale and offset.

    Shapes: q `[B, Sq, Hq, D]`, k and v `[B, Sk, Hkv, D]` (any strides but the last), or packed `[T, H, D]` with
    `cu_seqlens` int32 `[sequences + 1]` (`cu_seqlens_k` where the keys' lengths differ). Hq is a multiple of Hkv.
    scale: fp32 `[Hq]` (SEAL-H), `[Hq, D]` (SEAL-C), per batch row `[B, Hq, 1]` or `[B, Hq, D]`; offset: fp32 `[Hq, D]`.
    Masks: `causal` aligned to the end (query i sees keys up to i + Sk - Sq); `window` = number of keys a query sees,
    its own included. `softmax_scale` defaults to 1/sqrt(D). `max_seqlen` is an optional bound, no sync without it.
    `deterministic` (default: torch.are_deterministic_algorithms_enabled()) makes the gradients bitwise repeatable.
    `backend`: "auto", "cuda", "triton", "cpu" or "reference".

    Returns out `[B, Sq, Hq, D]` (packed `[T, Hq, D]`), with `return_lse` also the natural-log log-sum-exp `[B, Hq, Sq]`
    (packed `[Hq, T]`), fp32, -inf where a query sees no key (its attention output is 0).
    Raises ValueError, one sentence, for arguments outside this contract or a forced backend that cannot run.
    Source: SEAL (arXiv 2501.15225) section 4 for the scales; FlashAttention for the algorithm.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out, lse = _seal.attention(q, k, v, scale, offset, cu_seqlens, cu_seqlens_k, softmax_scale=softmax_scale,
                               causal=causal, window=window, max_seqlen=max_seqlen, max_seqlen_k=max_seqlen_k,
                               deterministic=deterministic, backend=backend or "auto")
    return (out, lse) if return_lse else out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None,
         positions_k: Tensor | None = None, *, interleaved: bool = False, inverse: bool = False,
         backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q `[B, Sq, Hq, D]` and k `[B, Sk, Hkv, D]` in one pass (also packed `[T, H, D]`).

    cos, sin: a table `[N, R/2]` read at `positions` (int, `[S]` or `[B, S]`; default: counted from 0, queries last), or
    values per token `[B, S, R/2]`. The first R channels turn: pairs (c, c + R/2), or (2c, 2c+1) when `interleaved`.
    `inverse` turns back. Returns the rotated q and k; differentiable. Raises ValueError outside this contract.
    Source: RoFormer (arXiv 2104.09864), eq. 34. `seal_ops.rope_tables` makes cos and sin.
    """
    return _seal.rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved, inverse=inverse,
                      backend=backend or "auto")


def rope_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None,
                   positions_k: Tensor | None = None, scale: Tensor | None = None, offset: Tensor | None = None, *,
                   interleaved: bool = False, softmax_scale: float | None = None, causal: bool = True,
                   window: int | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                   max_seqlen: int | None = None, max_seqlen_k: int | None = None, deterministic: bool | None = None,
                   backend: str | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention(*rope(q, k, ...), v, ...)` as one op that keeps only the rotated q and k for its backward, where the
    inverse rotation is applied as grad_q and grad_k are written. Arguments as in `rope` and `attention`; for packed
    input without positions they restart at 0 in every sequence."""
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if cu_seqlens is not None and positions is None:
        positions = packed_positions(cu_seqlens, q.shape[0], None if cu_seqlens_k is None else cu_seqlens_k)
        if cu_seqlens_k is not None:
            positions_k = packed_positions(cu_seqlens_k, k.shape[0])
    out, lse, _, _ = _seal.rope_attention(
        q, k, v, cos, sin, positions, positions_k, scale, offset, cu_seqlens, cu_seqlens_k, interleaved=interleaved,
        softmax_scale=softmax_scale, causal=causal, window=window, max_seqlen=max_seqlen, max_seqlen_k=max_seqlen_k,
        deterministic=deterministic, backend=backend or "auto")
    return (out, lse) if return_lse else out


def packed_positions(cu_seqlens: Tensor, tokens: int, cu_seqlens_k: Tensor | None = None) -> Tensor:
    """Positions int64 [tokens] that restart at 0 in every packed sequence, without a host sync; with `cu_seqlens_k` the
    queries are the last of each sequence's keys (position 0 where a query lies before its first key)."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True, out_int32=True).long()
    at = token - cu_seqlens[which]
    if cu_seqlens_k is not None:
        lengths, lengths_k = cu_seqlens.diff(), cu_seqlens_k.diff()
        at = (at + (lengths_k - lengths)[which]).clamp_min(0)
    return at
