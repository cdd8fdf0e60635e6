"""Finding the attention modules of a model.

Nothing here names a model class.  Which modules take part, how many heads they have, and whether ``o_proj`` reads the
attention output unchanged is *observed*, by running the model once on two tokens.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import UnsupportedAttention
from .masks import NAME
from .modes import run_two_tokens
from .patch import AttentionLayer, Patch
from .rotation import Rotation, with_fused_rotation


# --------------------------------------------------------------------------------------------------------------------
# Finding the attention modules
# --------------------------------------------------------------------------------------------------------------------
class _Probe:
    """Stands in for attention in one forward of two tokens and notes what passes."""

    def __init__(self, site: AttentionLayer):
        self.site, self.out, self.kept_rotation = site, None, False

    def observe(self, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> Tensor:
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


def _probe(model: nn.Module, sites: list[AttentionLayer], fuse_rotation: bool) -> None:
    """Runs two tokens through the model with every site watched; fills in what each site shows."""
    for site in sites:
        site.rotated = with_fused_rotation(site.module) if fuse_rotation else None
        site.deferred = site.rotated is not None
        site.probe = _Probe(site)
    seam = Patch(sites)
    hooks = [s.o_proj.register_forward_pre_hook(s.probe.observe_projection) for s in sites]
    seam.install()
    try:
        run_two_tokens(model)
    finally:
        seam.remove()
        for hook in hooks:
            hook.remove()
    for site in sites:
        site.deferred = site.probe.kept_rotation
        site.probe = None


def find_attention_layers(model: nn.Module, fuse_rotation: bool = True) -> list[AttentionLayer]:
    """The self-attention modules of a model, with their sizes, found by running it on two tokens.

    A candidate has an ``o_proj`` and a config with an attention implementation; it is kept if its attention call came
    through transformers' registry.  Raises ValueError where there is none, naming what was missing.
    """
    def fail(reason: str):
        return ValueError(f"seal_ops.attach: model must call attention through transformers' attention registry, "
                          f"{type(model).__name__} {reason}")

    candidates = [AttentionLayer(name, m) for name, m in model.named_modules()
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
        return find_attention_layers(model, fuse_rotation=False)
    sites = [s for s in candidates if s.num_heads]
    if not sites:
        raise fail("did not do so on two tokens")
    indices = [getattr(s.module, "layer_idx", None) for s in sites]
    if all(isinstance(i, int) for i in indices) and len(set(indices)) == len(indices):
        sites.sort(key=lambda s: s.module.layer_idx)
    return sites
