"""The attention function that transformers' registry calls: fused where the op has every term, else composed."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ..ops.factors import full_view
from ..ops.functional import attention, rope, rope_attention
from . import decoding
from .context_extension.packing import packing_of, run_packed
from .layers import why_no_soft_cap
from .masks import NAME, PLAIN, CallMask, as_tensor, read_mask, with_documents
from .model_parallel import ulysses
from .model_parallel.head_shares import share_of
from .rotation import MAX_HEAD_DIM, Rotation

_UNSUPPORTED = {
    "position_bias": "a position bias",
    "sinks": "attention sinks of their own for every token",
    "cache": "a paged cache",
    "head_mask": "a head mask",
}
# flash-attention's, as collators give them; max_length_k says nothing that max_length_q does not
_FLASH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q")


class UnsupportedAttention(ValueError):
    """A model's attention has a term that the scaled attention does not have."""


class UnknownCaller(RuntimeError):
    """A module of a model without scales calls the attention of models that have them."""

    def __init__(self, module: nn.Module):
        super().__init__(
            f"seal_ops: {type(module).__name__} must have a config of its own, its config says "
            f"attn_implementation={NAME!r} because a model with scales attached shares or gave it; build the "
            f"model from another config, or set its attn_implementation"
        )
        self.module = module


def attention_forward(module: nn.Module, *tensors, **options) -> tuple[Tensor, None]:
    """The entry of transformers' attention registry.

    query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D], ``attention_mask`` from `attention_mask` above, or a boolean or
    additive mask [B, 1, Sq, Sk]; then the options of `_attend`, among them ``s_aux`` [Hq], attention sinks.  Returns
    ([B, Sq, Hq, D], None), scaled by the module's scales.  Raises UnsupportedAttention for terms that the op does not
    have.
    """
    layer = getattr(module, "_seal_layer", None)
    if layer is None and not getattr(module, "_seal_bystander", False):
        raise UnknownCaller(module)
    return _attend(layer, module, *tensors, **options)


def plain_attention_forward(module: nn.Module, *tensors, **options) -> tuple[Tensor, None]:
    """`attention_forward` for a model without scales, under the name ``PLAIN``."""
    return _attend(None, module, *tensors, **options)


def _attend(
    layer,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    seal_rotation: Rotation | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        warnings.warn(
            "seal_ops: output_attentions=True gives None for the attention of a fused op, as with SDPA; "
            "seal_ops.ops.attention_maps sums it up without a score matrix",
            stacklevel=2,
        )
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(
                f"seal_ops.attach: model must have attention without {what}, {type(module).__name__} passes {name}"
            )
    sink = s_aux  # transformers' name for it
    backend = None if layer is None else layer.backend
    composed = _unfit_shapes(query, value)
    if layer is not None and layer.probe is not None:
        capped, windowed = softcap is not None, sliding_window is not None
        return layer.probe.observe(query, key, value, seal_rotation, composed, capped, windowed), None
    if composed is None and softcap is not None:
        composed = why_no_soft_cap(backend, value.device, value.dtype, query.shape[-1])
    scale = None if layer is None else layer.current(query.shape[0])
    share = None if layer is None else share_of(layer, query.shape[1])
    exchanged = layer is not None and ulysses.is_on(NAME)
    if (share is not None or exchanged) and (layer.program is not None or layer.training_mask is not None):
        raise UnsupportedAttention(
            f"seal_ops: an extended model, or one with a mask of training, must not be divided among processes, got "
            f"{type(module).__name__} with {query.shape[1]} of {layer.num_heads} heads"
        )
    if share is not None:
        scale, sink = share.of_scale(scale), share.of(sink, 0)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.dtype != v.dtype:  # autocast turns the rotated q and k to fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    if scale is not None:
        scale = scale.to(q.device, torch.float64 if q.dtype == torch.float64 else None)
    program = None if layer is None else layer.program
    unrotated = program is not None and program.unrotated
    if seal_rotation is None:
        unchanged = not unrotated
    else:  # unrotated keys come through the cache
        unchanged = seal_rotation.q is query and (unrotated or seal_rotation.k is key)
    if not unchanged:
        raise RuntimeError(
            f"seal_ops: {type(module).__name__} changed q or k after the rotation in this call but not "
            f"when it was attached; attach again in the present configuration"
        )

    mask = read_mask(module, attention_mask, q.shape[0], q.shape[1], k.shape[1], sliding_window, is_causal)
    mask = with_documents(mask, module, q, *(kwargs.get(name) for name in _FLASH_ARGUMENTS))
    if exchanged:
        mask = ulysses.with_positions(mask, kwargs.get("position_ids"), q.shape[1])
    if mask.ranges is not None:
        alone = program is None and composed is None and sink is None and seal_rotation is None
        if alone and dropout == 0 and decoding.fits(mask.ranges, q, key, value):
            return decoding.attend(mask.ranges, q, key, value, scale, scaling, backend, softcap), None
        mask = CallMask(False, None, mask.keys, dense=as_tensor(mask, q))
    k, v = k[:, : mask.keys], v[:, : mask.keys]
    if program is not None and torch.jit.is_tracing():
        raise UnsupportedAttention(
            f"seal_ops: an extended model must not be traced by torch.jit.trace, which would keep what its example's "
            f"length asks for at every other, got {type(module).__name__}; use torch.compile"
        )
    if program is not None and program.serves(q.shape[1], k.shape[1]):
        if dropout:
            raise UnsupportedAttention(
                f"seal_ops: an extended model must have no attention dropout, {type(module).__name__} passes {dropout}"
            )
        if seal_rotation is not None and not unrotated:
            q, k = rope(q, k, seal_rotation.cos, seal_rotation.sin, backend=backend)
        attend = functools.partial(program.attend, softmax_scale=scaling, sink=sink, softcap=softcap, backend=backend)
        packing = packing_of(mask, q, k)
        if packing is None:
            return attend(q, k, v, k.shape[1], scale=scale), None
        return run_packed(packing, attend, q, k, v, scale), None
    common = dict(softmax_scale=scaling, causal=mask.causal, window=mask.window, backend=backend)
    common |= dict(sink=sink, softcap=softcap)
    fused = composed is None and dropout == 0 and mask.dense is None
    if layer is not None and layer.training_mask is not None and module.training:
        if not (fused and mask.causal and mask.window is None):
            raise UnsupportedAttention(
                f"seal_ops: a mask of training must take the place of a causal one, {type(module).__name__} has "
                f"{'attention dropout' if dropout else 'another mask'}"
            )
        common |= dict(causal=True, window=None, mask=layer.training_mask)
    if seal_rotation is not None:
        if fused and mask.cu_seqlens is None:
            return rope_attention(q, k, v, seal_rotation.cos, seal_rotation.sin, scale=scale, **common), None
        q, k = rope(q, k, seal_rotation.cos, seal_rotation.sin, backend=backend)
    if not fused:
        return _composed(q, k, v, as_tensor(mask, q), scale, scaling, dropout, softcap, sink), None
    if mask.cu_seqlens is not None:
        return _packed(q, k, v, scale, mask, common), None
    return attention(q, k, v, scale, **common), None


def _unfit_shapes(query: Tensor, value: Tensor) -> str | None:
    """Why a layer's attention is composed from PyTorch's parts, whatever the backend; None where the op takes it."""
    if value.shape[-1] != query.shape[-1]:
        return f"values of {value.shape[-1]} channels beside keys of {query.shape[-1]}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {query.shape[-1]} above {MAX_HEAD_DIM}"
    return None


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None, mask: CallMask, common: dict) -> Tensor:
    """The fused op on the sequences of a batch; 0 at the tokens of a padded batch that belong to none."""
    batch, length = q.shape[:2]
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    common = dict(common, cu_seqlens=mask.cu_seqlens, max_seqlen=mask.max_seqlen)
    if mask.tokens is None:
        if scale is not None and scale.dim() == 3:
            if not mask.in_rows:
                raise ValueError(
                    f"seal_ops: packed rows must have scales for all rows alike, got scales for each of {batch} rows"
                )
            scale = scale.index_select(0, (mask.cu_seqlens[:-1] // length).clamp(max=batch - 1))
        return attention(*packed, scale, **common).unflatten(0, (batch, length))
    if mask.padding_too and scale is not None and scale.dim() == 3:
        scale = scale.repeat_interleave(2, 0)
    out = attention(*(t.index_select(0, mask.tokens) for t in packed), scale, **common)
    if mask.padding_too:
        out = out.masked_fill(~mask.real_in_order(batch).flatten()[:, None, None], 0)
    padded = out.new_zeros(batch * length, *out.shape[1:])
    return padded.index_copy(0, mask.tokens.long(), out).unflatten(0, (batch, length))


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    softmax_scale: float | None,
    dropout: float,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Attention from PyTorch's parts, for mask tensors, dropout and soft-capped scores, times the scale.

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; mask boolean or additive, broadcast to [B, Hq, Sq, Sk];
    sink [Hq].
    """
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if groups > 1 and length == 1 and sink is None and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1):
        q = q.reshape(batch, -1, groups, q.shape[-1])  # decoding: the heads of a group as queries, no copy of the cache
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    if sink is not None:  # one more key, whose score is the mask's entry, without a value
        mask = _with_sink(mask, sink, q, k.shape[2])
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
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


def _with_sink(mask: Tensor | None, sink: Tensor, q: Tensor, keys: int) -> Tensor:
    """The additive mask [B or 1, Hq, Sq, keys + 1] whose last column is the sink's logit."""
    if mask is None:
        mask = q.new_zeros(1, 1, 1, keys)
    elif mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    rows = (mask.shape[0] if mask.dim() == 4 else 1, q.shape[1], q.shape[2])
    column = sink.to(q.dtype)[None, :, None, None].expand(*rows, 1)
    return torch.cat([mask.to(q.dtype).expand(*rows, keys), column], -1)


AttentionInterface.register(NAME, attention_forward)
AttentionInterface.register(PLAIN, plain_attention_forward)
