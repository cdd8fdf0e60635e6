"""The attention function that transformers' registry calls: fused where the op has every term, else composed."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ..ops.factors import full_view
from ..ops.functional import attention, rope_attention
from .masks import NAME, as_tensor, read_mask, split_packing
from .rotation import Rotation

# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------
_UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache",
                "head_mask": "a head mask"}


class UnsupportedAttention(ValueError):
    """A model's attention has a term that the scaled attention does not have."""


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                      softcap: float | None = None, is_causal: bool | None = None,
                      seal_rotation: Rotation | None = None, **kwargs) -> tuple[Tensor, None]:
    """The entry of transformers' attention registry.

    query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D], ``attention_mask`` from `attention_mask` above, or a boolean or
    additive mask [B, 1, Sq, Sk].  Returns ([B, Sq, Hq, D], None), scaled by the module's scales.  Raises
    UnsupportedAttention for attention sinks and other terms that the op does not have.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"seal_ops.attach: model must have attention without {what}, "
                                       f"{type(module).__name__} passes {name}")
    site = getattr(module, "_seal_site", None)
    if site is not None and site.probe is not None:
        return site.probe.observe(query, key, value, seal_rotation), None
    scale = None if site is None else site.current()
    backend = None if site is None else site.backend
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.dtype != v.dtype:  # autocast turns the rotated q and k to fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    if scale is not None:
        scale = scale.to(q.device, torch.float64 if q.dtype == torch.float64 else None)
    if seal_rotation is not None and (seal_rotation.q is not query or seal_rotation.k is not key):
        raise RuntimeError(f"seal_ops: {type(module).__name__} changed q or k after the rotation in this call but not "
                           f"when it was attached; attach again in the present configuration")

    mask = read_mask(module, attention_mask, q.shape[1], k.shape[1], sliding_window, is_causal)
    k, v = k[:, :mask.keys], v[:, :mask.keys]
    common = dict(softmax_scale=scaling, causal=mask.causal, window=mask.window, backend=backend)
    composed = softcap is not None or dropout > 0 or q.shape[-1] != v.shape[-1] or mask.dense is not None
    if seal_rotation is not None and not composed and mask.packing is None:
        return rope_attention(q, k, v, seal_rotation.cos, seal_rotation.sin, scale=scale, **common), None
    if seal_rotation is not None:
        q, k = seal_rotation.apply(q, k)
    if composed:
        return _composed(q, k, v, as_tensor(mask, q, k), scale, scaling, dropout, softcap), None
    if mask.packing is not None:
        return _packed(q, k, v, scale, mask.packing, common), None
    return attention(q, k, v, scale, **common), None


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None, packing: Tensor, common: dict) -> Tensor:
    """The fused op on the real tokens of a padded batch; 0 at the others."""
    tokens, cu_seqlens = split_packing(packing, q.shape[0])
    out = attention(*(t.flatten(0, 1).index_select(0, tokens) for t in (q, k, v)), scale, cu_seqlens=cu_seqlens,
                    max_seqlen=q.shape[1], **common)
    padded = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:])
    return padded.index_copy(0, tokens.long(), out).unflatten(0, q.shape[:2])


def _composed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Tensor | None, softmax_scale: float | None,
              dropout: float, softcap: float | None) -> Tensor:
    """Attention from PyTorch's parts, for mask tensors, dropout and soft-capped scores, times the scale.

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; mask boolean or additive, broadcast to [B, Hq, Sq, Sk].
    """
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if groups > 1 and length == 1 and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1):
        q = q.reshape(batch, -1, groups, q.shape[-1])  # decoding: the heads of a group as queries, no copy of the cache
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is not None:
        mask = mask[..., :k.shape[2]]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=softmax_scale)
    else:
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, -1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        out = F.dropout(weights.to(q.dtype), dropout) @ v
    out = out.reshape(batch, heads, length, -1).transpose(1, 2)
    if scale is None:
        return out
    factor = full_view(scale, out.shape[2], out.shape[3])[:, None]  # [B or 1, 1, Hq, D or 1]
    return (out.to(factor.dtype) * factor).to(out.dtype)


AttentionInterface.register(NAME, attention_forward)
