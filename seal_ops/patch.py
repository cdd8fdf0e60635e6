"""The seam into Hugging Face transformers: attention and mask registries, and the rotation inside an attention module.

Nothing here names a model class.  Which modules take part, how many heads they have, and whether ``o_proj`` reads the
attention output unchanged is *observed*, by running the model once on two tokens (`find_sites`).  Only instances are
changed: each model's own config entry and, where the rotation is fused, the ``forward`` of its attention modules.
"""
from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from . import mask as masks
from .factors import full_view
from .ops import attention, rope, rope_attention

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


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------
_UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache",
                "head_mask": "a head mask"}


class UnsupportedAttention(ValueError):
    """A model's attention has a term that the scaled attention does not have."""


@dataclasses.dataclass(eq=False)
class Site:
    """One self-attention module of a model, as observed, and what is laid on it.

    ``direct``: ``o_proj`` reads the attention output unchanged (so scales can be merged).  ``scaling`` (set by
    `seal_ops.attach`) has the method ``current()`` -> fp32 [Hq], [Hq, D], [B, Hq, 1] or [B, Hq, D], or None.
    """
    name: str
    module: nn.Module
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    direct: bool = False
    rotated: types.FunctionType | None = None  # the module's forward with the rotation replaced
    deferred: bool = False  # the rotation may wait for the attention call
    scaling: nn.Module | None = None
    backend: str | None = None
    probe: "_Probe | None" = None

    @property
    def o_proj(self) -> nn.Module:
        return self.module.o_proj

    def current(self) -> Tensor | None:
        return None if self.scaling is None else self.scaling.current()


class _Rotation:
    """cos and sin on their way through a module's forward.

    With ``waits`` the rotation is left to the attention call, and q and k are kept to see that it gets the same.
    """

    def __init__(self, cos: Tensor, sin: Tensor, waits: bool, backend: str | None):
        self.cos, self.sin = _halves(cos, sin)
        self.waits, self.backend = waits, backend
        self.q = self.k = None

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, S, Hq, D] and k [B, S, Hkv, D], rotated."""
        return rope(q, k, self.cos, self.sin, backend=self.backend)


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, R/2] of transformers' [B, S, R], whose two halves are equal where pairs are (c, c + R/2)."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _rotate(q, k, cos, sin, unsqueeze_dim=1):
    """Takes the place of a model's half-split ``apply_rotary_pos_emb``; q [B, Hq, S, D], k [B, Hkv, S, D]."""
    rotation = cos if isinstance(cos, _Rotation) else _Rotation(cos, sin, waits=False, backend=None)
    if rotation.waits:
        rotation.q, rotation.k = q, k
        return q, k
    if unsqueeze_dim == 1:
        q, k = rotation.apply(q.transpose(1, 2), k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)
    return rotation.apply(q, k)


def _forward(self, *args, **kwargs):
    """``forward`` of an attention module whose rotation is fused; ``self`` is that module."""
    site = self._seal_site
    embeddings = kwargs.get("position_embeddings")
    if site.deferred and embeddings is not None:
        # A cache wants rotated keys before the attention call. Its argument has had several names, so its type tells.
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        rotation = _Rotation(*embeddings, waits=not cached, backend=site.backend)
        kwargs["position_embeddings"] = (rotation, rotation.sin)
        if rotation.waits:
            kwargs["seal_rotation"] = rotation
    return site.rotated(self, *args, **kwargs)


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                      softcap: float | None = None, is_causal: bool | None = None,
                      seal_rotation: _Rotation | None = None, **kwargs) -> tuple[Tensor, None]:
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

    mask = _read_mask(module, attention_mask, q.shape[1], k.shape[1], sliding_window, is_causal)
    k, v = k[:, :mask.keys], v[:, :mask.keys]
    common = dict(softmax_scale=scaling, causal=mask.causal, window=mask.window, backend=backend)
    composed = softcap is not None or dropout > 0 or q.shape[-1] != v.shape[-1] or mask.dense is not None
    if seal_rotation is not None and not composed and mask.packing is None:
        return rope_attention(q, k, v, seal_rotation.cos, seal_rotation.sin, scale=scale, **common), None
    if seal_rotation is not None:
        q, k = seal_rotation.apply(q, k)
    if composed:
        return _composed(q, k, v, _dense(mask, q, k), scale, scaling, dropout, softcap), None
    if mask.packing is not None:
        return _packed(q, k, v, scale, mask.packing, common), None
    return attention(q, k, v, scale, **common), None


class _Mask(typing.NamedTuple):
    """A mask as the attention call needs it: the first ``keys`` keys are real, and one of three more precise terms."""
    causal: bool
    window: int | None
    keys: int
    packing: Tensor | None = None  # the T real tokens of a padded batch, then B + 1 boundaries
    dense: Tensor | None = None  # boolean or additive, [B, 1, Sq, Sk]


def _read_mask(module: nn.Module, mask: Tensor | None, queries: int, keys: int, sliding_window: int | None,
               is_causal: bool | None) -> _Mask:
    """What the mask argument of an attention call says."""
    if mask is None:  # not from `attention_mask`: the module was called by itself
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries != keys:  # aligned to the start (SDPA) or to the end (flash-attn)?
            raise ValueError(f"seal_ops: {type(module).__name__} must be given a mask where {queries} queries meet {keys} "
                             f"keys, got None, which does not say which keys they may see")
        return _Mask(causal, sliding_window if causal else None, keys)
    if _is_structure(mask):
        return _Mask(mask.shape[0] == _CAUSAL, mask.shape[1] or None, mask.shape[3])
    if _is_packing(mask):
        return _Mask(True, mask.shape[1] - 1 or None, queries, packing=mask[0, 0, 0])
    return _Mask(False, None, keys, dense=mask)


def _split_packing(packing: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The indices [T] of the real tokens in B * S, and cu_seqlens [B + 1]."""
    return packing[:-batch - 1], packing[-batch - 1:]


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None, packing: Tensor, common: dict) -> Tensor:
    """The fused op on the real tokens of a padded batch; 0 at the others."""
    tokens, cu_seqlens = _split_packing(packing, q.shape[0])
    out = attention(*(t.flatten(0, 1).index_select(0, tokens) for t in (q, k, v)), scale, cu_seqlens=cu_seqlens,
                    max_seqlen=q.shape[1], **common)
    padded = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:])
    return padded.index_copy(0, tokens.long(), out).unflatten(0, q.shape[:2])


def _dense(mask: _Mask, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a tensor; None where every query sees every key."""
    if mask.dense is not None or not mask.causal:  # only causal masks come with a window
        return mask.dense
    seen = masks.allowed(q.shape[1], k.shape[1], *masks.bounds(mask.causal, mask.window), device=q.device)
    if mask.packing is None:
        return seen
    tokens, _ = _split_packing(mask.packing, q.shape[0])
    real = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.bool, device=q.device).index_fill(0, tokens.long(), True)
    return seen & real.view(q.shape[0], 1, 1, -1)


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
AttentionMaskInterface.register(NAME, attention_mask)


# --------------------------------------------------------------------------------------------------------------------
# Finding the attention modules
# --------------------------------------------------------------------------------------------------------------------
class _Probe:
    """Stands in for attention in one forward of two tokens and notes what passes."""

    def __init__(self, site: Site):
        self.site, self.out, self.kept_rotation = site, None, False

    def observe(self, query: Tensor, key: Tensor, value: Tensor, rotation: _Rotation | None) -> Tensor:
        batch, heads, length, _ = query.shape
        site = self.site
        site.num_heads, site.num_kv_heads, site.head_dim = heads, key.shape[1], value.shape[-1]
        self.kept_rotation = rotation is not None and rotation.q is query and rotation.k is key
        # Distinct values: a norm, a gate or a permutation before o_proj shows.
        size = length * heads * site.head_dim
        self.out = (torch.arange(batch * size, device=query.device).reshape(batch, length, heads, -1) % 251 - 125).to(
            query.dtype)
        return self.out

    def observe_projection(self, module: nn.Module, args: tuple) -> None:
        if self.out is not None and args:
            expected = self.out.flatten(2).to(args[0].dtype)
            self.site.direct = args[0].shape == expected.shape and bool(torch.equal(args[0], expected))


@functools.lru_cache(maxsize=None)
def _is_half_split(function) -> bool:
    """Whether ``function(q, k, cos, sin)`` is the half-split rotation, also where only the first R < D channels turn."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    matches = []
    for rotary_dim in (8, 4):
        angle = torch.randn(1, 3, rotary_dim // 2, generator=generator)
        cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        try:
            got = function(q, k, cos, sin)
        except Exception:  # another signature, or a function that cannot turn part of the channels
            matches.append(None)
            continue
        expected = _rotate(q, k, cos, sin)
        matches.append(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected)))
    return matches[0] is True and matches[1] is not False


def _with_fused_rotation(module: nn.Module) -> types.FunctionType | None:
    """The module's own forward with its rotary function replaced, or None where it has no such seam.

    The forward keeps its code; only the name of the rotary function resolves to `_rotate`, in this copy alone, so
    neither the class nor its file is touched.
    """
    forward = inspect.unwrap(type(module).forward)  # under transformers' decorators
    if "forward" in module.__dict__ or not isinstance(forward, types.FunctionType):
        return None  # hooked by another library
    names = [n for n in forward.__code__.co_names if "rotary" in n and callable(forward.__globals__.get(n))]
    if len(names) != 1 or not _is_half_split(forward.__globals__[names[0]]):
        return None
    scope = {**forward.__globals__, names[0]: _rotate}
    # torch.compile looks globals up in the module called __name__, which would bring the original function back.
    scope.pop("__name__")
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__, copy.__module__, copy.__doc__ = forward.__kwdefaults__, forward.__module__, forward.__doc__
    return copy


class Seam:
    """All changes to one model, put on and taken off together; ``sites`` in the order of the layers."""

    def __init__(self, sites: list[Site]):
        self.sites = sites
        configs = {id(s.module.config): s.module.config for s in sites}
        self.configs = [(config, config._attn_implementation) for config in configs.values()]
        self.installed = False

    def install(self) -> None:
        for config, _ in self.configs:
            config._attn_implementation_internal = NAME  # the property would also reach sub-models such as a vision tower
        for site in self.sites:
            site.module.__dict__["_seal_site"] = site
            if site.rotated is not None:
                site.module.__dict__["forward"] = types.MethodType(_forward, site.module)
        self.installed = True

    def remove(self) -> None:
        for config, previous in self.configs:
            config._attn_implementation_internal = previous
        for site in self.sites:
            site.module.__dict__.pop("_seal_site", None)
            if site.rotated is not None:
                site.module.__dict__.pop("forward", None)
        self.installed = False


def _run_two_tokens(model: nn.Module) -> None:
    modes = [(m, m.training) for m in model.modules()]
    device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    try:
        model.eval()  # no dropout, no checkpointing
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    finally:
        for module, training in modes:
            module.training = training


def _probe(model: nn.Module, sites: list[Site], fuse_rotation: bool) -> None:
    """Runs two tokens through the model with every site watched; fills in what each site shows."""
    for site in sites:
        site.rotated = _with_fused_rotation(site.module) if fuse_rotation else None
        site.deferred = site.rotated is not None
        site.probe = _Probe(site)
    seam = Seam(sites)
    hooks = [s.o_proj.register_forward_pre_hook(s.probe.observe_projection) for s in sites]
    seam.install()
    try:
        _run_two_tokens(model)
    finally:
        seam.remove()
        for hook in hooks:
            hook.remove()
    for site in sites:
        site.deferred = site.probe.kept_rotation
        site.probe = None


def find_sites(model: nn.Module, fuse_rotation: bool = True) -> list[Site]:
    """The self-attention modules of a model, with their sizes, found by running it on two tokens.

    A candidate has an ``o_proj`` and a config with an attention implementation; it is kept if its attention call came
    through transformers' registry.  Raises ValueError where there is none, naming what was missing.
    """
    def fail(reason: str):
        return ValueError(f"seal_ops.attach: model must call attention through transformers' attention registry, "
                          f"{type(model).__name__} {reason}")

    candidates = [Site(name, m) for name, m in model.named_modules()
                  if isinstance(getattr(m, "o_proj", None), nn.Module)
                  and getattr(getattr(m, "config", None), "_attn_implementation", None) is not None]
    if not candidates:
        raise fail("has no module with an o_proj and a config")
    if any(s.module.config._attn_implementation == NAME for s in candidates):
        raise ValueError(f"seal_ops.attach: model must have a config of its own, this {type(model).__name__} shares its "
                         f"config object with a model that has scales attached")
    if not hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
        raise ValueError("seal_ops.attach: model must have its weights loaded, found parameters on the meta device")
    try:
        _probe(model, candidates, fuse_rotation)
    except UnsupportedAttention:
        raise
    except Exception as error:
        # A forward that looks into cos and sin refuses the stand-in that carries a deferred rotation.
        if not any(s.rotated for s in candidates):
            raise fail(f"failed on two tokens ({type(error).__name__}: {error})") from error
        return find_sites(model, fuse_rotation=False)
    sites = [s for s in candidates if s.num_heads]
    if not sites:
        raise fail("did not do so on two tokens")
    indices = [getattr(s.module, "layer_idx", None) for s in sites]
    if all(isinstance(i, int) for i in indices) and len(set(indices)) == len(indices):
        sites.sort(key=lambda s: s.module.layer_idx)
    return sites
