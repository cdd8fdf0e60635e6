"""What users call: `attention`, `rope`, `rope_attention` and `packed_positions`. docs/ops.md is the contract."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, dispatch, epilogue, registration  # noqa: F401  registration defines the ops
from .masks import BlockMask, Mask

_attention = torch.ops.seal.attention.default
_rope = torch.ops.seal.rope.default
_rope_attention = torch.ops.seal.rope_attention.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Mask | BlockMask | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    sink: Tensor | None = None,
    gate: Tensor | None = None,
    gate_function: str = "sigmoid",
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scale * softmax(softmax_scale * q k^T + mask) v + offset`, fused; differentiable in every floating tensor.

    Shapes: q `[B, Sq, Hq, D]`, k and v `[B, Sk, Hkv, D]` (any strides but the last), or packed `[T, H, D]` with
    `cu_seqlens` int32 `[sequences + 1]` (`cu_seqlens_k` where the keys' lengths differ). Hq is a multiple of Hkv.
    scale: fp32 `[Hq]` (SEAL-H), `[Hq, D]` (SEAL-C), per batch row `[B, Hq, 1]` or `[B, Hq, D]`; offset: fp32 `[Hq, D]`.
    Masks: `causal` aligned to the end (query i sees keys up to i + Sk - Sq); `window` = number of keys a query sees,
    its own included. `mask` in their place: any of `seal_ops.masks` (or the op's eight integers).
    `softmax_scale` defaults to 1/sqrt(D). `max_seqlen` is an optional bound, no sync without it.
    `deterministic` (default: torch.are_deterministic_algorithms_enabled()) makes the gradients bitwise repeatable.
    `backend`: "auto", "cuda", "triton", "cpu" or "reference".
    `sink`: one logit a query head `[Hq]` that joins the softmax's denominator. `gate` `[B, Sq, Hq, D]` or
    `[B, Sq, Hq, 1]` (packed `[T, Hq, ...]`) multiplies the scaled output by `gate_function` of it ("sigmoid",
    "softplus" or "identity"). Both go without an offset. `softcap`: a bound c > 0 of the scores, c * tanh(score / c).
    The kernels of the backends "triton" and "reference" have these terms inside; around "cuda" and "cpu" sink and gate
    are composed, and a soft cap is not for those (`seal_ops.backends(terms=...)` says so). An identity gate is always
    a product after the op.

    Returns:
        out `[B, Sq, Hq, D]` (packed `[T, Hq, D]`), with `return_lse` also the natural-log log-sum-exp `[B, Hq, Sq]`
        (packed `[Hq, T]`), fp32, -inf where a query sees no key (its attention output is 0).

    Raises:
        ValueError: arguments outside this contract, or a forced backend that cannot run.

    Source:
        SEAL (arXiv 2501.15225) section 4 for the scales; FlashAttention for the algorithm;
        gpt-oss (arXiv 2508.10925) for the sink; gated attention (arXiv 2505.06708) for the gate; Gemma 2
        (arXiv 2408.00118) for the soft cap.
    """
    within, after = _terms("attention", q, offset, sink, gate, gate_function, softcap, backend)
    try:
        out, lse = _attention(
            q,
            k,
            v,
            scale,
            offset,
            cu_seqlens,
            cu_seqlens_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            **_mask_arguments("attention", mask, q, causal),
            max_seqlen=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            deterministic=bool(deterministic),
            **within,
            backend=backend or "auto",
        )
    except RuntimeError as error:
        checks.raise_mistyped("attention", error, k=k, v=v, scale=scale, offset=offset)
    out, lse = epilogue.apply(out, lse, *after)
    return (out, lse) if return_lse else out


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    positions_k: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q `[B, Sq, Hq, D]` and k `[B, Sk, Hkv, D]` in one pass (also packed `[T, H, D]`).

    cos, sin: a table `[N, R/2]` read at `positions` (int, `[S]` or `[B, S]`; default: counted from 0, queries last), or
    values per token `[B, S, R/2]`. The first R channels turn: pairs (c, c + R/2), or (2c, 2c+1) when `interleaved`.
    `inverse` turns back. Differentiable. `seal_ops.rope_tables` makes cos and sin.

    Returns:
        The rotated q and k.

    Raises:
        ValueError: arguments outside this contract.

    Source:
        RoFormer (arXiv 2104.09864), eq. 34.
    """
    try:
        return _rope(
            q, k, cos, sin, positions, positions_k, interleaved=interleaved, inverse=inverse, backend=backend or "auto"
        )
    except RuntimeError as error:
        checks.raise_mistyped("rope", error, q=q, k=k, cos=cos, sin=sin)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    positions_k: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    interleaved: bool = False,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    mask: Mask | BlockMask | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    sink: Tensor | None = None,
    gate: Tensor | None = None,
    gate_function: str = "sigmoid",
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention(*rope(q, k, ...), v, ...)` as one op.

    It keeps only the rotated q and k for its backward, where the inverse rotation is applied as grad_q and grad_k are
    written. Arguments as in `rope` and `attention`; for packed input without positions they restart at 0 in every
    sequence.

    Raises:
        ValueError: as `rope` and `attention`.
    """
    if cu_seqlens is not None and positions is None and positions_k is None:
        for name, t in (("q", q), ("k", k)):
            checks.tensor("rope_attention", name, t)
        positions = packed_positions(cu_seqlens, q.shape[0], cu_seqlens_k)
        if cu_seqlens_k is not None:
            positions_k = packed_positions(cu_seqlens_k, k.shape[0])
    within, after = _terms("rope_attention", q, offset, sink, gate, gate_function, softcap, backend)
    try:
        out, lse, _, _ = _rope_attention(
            q,
            k,
            v,
            cos,
            sin,
            positions,
            positions_k,
            scale,
            offset,
            cu_seqlens,
            cu_seqlens_k,
            interleaved=interleaved,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            **_mask_arguments("rope_attention", mask, q, causal),
            max_seqlen=max_seqlen,
            max_seqlen_k=max_seqlen_k,
            deterministic=bool(deterministic),
            **within,
            backend=backend or "auto",
        )
    except RuntimeError as error:
        checks.raise_mistyped("rope_attention", error, k=k, v=v, cos=cos, sin=sin, scale=scale, offset=offset)
    out, lse = epilogue.apply(out, lse, *after)
    return (out, lse) if return_lse else out


def _terms(
    op: str,
    q: Tensor,
    offset: Tensor | None,
    sink: Tensor | None,
    gate: Tensor | None,
    gate_function: str,
    softcap: float | None,
    backend: str | None,
) -> tuple[dict, tuple]:
    """The op's own arguments for what goes with the softmax, and what `epilogue.apply` composes after the op."""
    checks.tensor(op, "q", q)
    within = {} if softcap is None else dict(softcap=softcap)
    if q.dim() not in (3, 4):  # the op says so
        return within, (None, None, gate_function)
    checks.terms(op, q, offset, sink, gate, gate_function, tuple(epilogue.GATE_FUNCTIONS))
    if sink is None and gate is None:
        return within, (None, None, gate_function)
    head_dim = operator.index(q.shape[-1])  # a trace with symbolic sizes takes it for what it is
    runs = dispatch.chosen(backend or "auto", op, q.device, q.dtype, head_dim, tuple(within))
    if runs not in dispatch.TAKE_TERMS:
        return within, (sink, gate, gate_function)
    if sink is not None:
        within |= dict(sink=sink)
    if gate is None or gate_function == "identity":  # its gradient wants the output before the gate, kept
        return within, (None, gate, gate_function)
    return dict(within, gate=gate, gate_function=gate_function), (None, None, gate_function)


def _mask_arguments(op: str, mask: Mask | BlockMask | Sequence[int] | None, q: Tensor, causal: bool) -> dict:
    """The op's arguments for a mask of q [..., H, D]: its share of shifted heads becomes heads."""
    if causal is None:  # the dispatcher would read it as False
        checks.fail(op, "causal", "be True or False", None)
    arguments = {}
    if isinstance(mask, BlockMask):
        arguments = dict(blocks=mask.visited, block_size=mask.size)
        mask = mask.mask
    if isinstance(mask, Mask):
        mask = mask.resolve(q.shape[-2])
    if mask is not None and not isinstance(mask, (list, tuple)):
        checks.fail(op, "mask", "be made by seal_ops.masks (or be the op's 8 integers)", type(mask).__name__)
    return dict(arguments, mask=mask)


def packed_positions(cu_seqlens: Tensor, tokens: int, cu_seqlens_k: Tensor | None = None) -> Tensor:
    """Positions int64 `[tokens]` that restart at 0 in every packed sequence, without a host sync.

    With `cu_seqlens_k` the queries are the last of each sequence's keys (position 0 where a query lies before its first
    key). Tokens beyond the last sequence (padding) count from 0 once more.

    Raises:
        ValueError: lengths that are not int32 or int64 `[sequences + 1]`, or that differ in shape or device.
    """
    for name, t in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if t is None and name == "cu_seqlens_k":
            continue
        checks.tensor("packed_positions", name, t)
        if t.dtype not in (torch.int32, torch.int64) or t.dim() != 1 or t.shape[0] < 1:
            checks.fail(
                "packed_positions", name, "be int32 or int64 of shape [sequences + 1]", f"{t.dtype} {list(t.shape)}"
            )
        if t.shape != cu_seqlens.shape or t.device != cu_seqlens.device:
            expected = f"have cu_seqlens' shape {list(cu_seqlens.shape)} and device {cu_seqlens.device}"
            checks.fail("packed_positions", name, expected, f"{list(t.shape)} on {t.device}")
    traced = isinstance(tokens, Tensor) and torch.jit.is_tracing()  # a size is a tensor there
    if not (traced or isinstance(tokens, (int, torch.SymInt))) or (isinstance(tokens, int) and tokens < 0):
        checks.fail("packed_positions", "tokens", "be a number of tokens", repr(tokens))
    token = torch.arange(tokens, device=cu_seqlens.device)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True, out_int32=True).long()
    at = token - cu_seqlens[which]
    if cu_seqlens_k is not None:
        longer = torch.nn.functional.pad(cu_seqlens_k.diff() - cu_seqlens.diff(), (0, 1))  # 0 for padding
        at = (at + longer[which]).clamp_min(0)
    return at
