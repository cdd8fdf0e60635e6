"""The changes to one model, put on and taken off together.

Only instances are changed: each model's own config entry and, where the rotation is fused, the ``forward`` of its
attention modules.
"""
from __future__ import annotations

import dataclasses
import types

from torch import Tensor, nn
from transformers.cache_utils import Cache

from .masks import NAME
from .rotation import Rotation


@dataclasses.dataclass(eq=False)
class AttentionLayer:
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
    probe: object | None = None  # discovery's, while it watches

    @property
    def o_proj(self) -> nn.Module:
        return self.module.o_proj

    def current(self) -> Tensor | None:
        return None if self.scaling is None else self.scaling.current()


def _forward(self, *args, **kwargs):
    """``forward`` of an attention module whose rotation is fused; ``self`` is that module."""
    site = self._seal_site
    embeddings = kwargs.get("position_embeddings")
    if site.deferred and embeddings is not None:
        # A cache wants rotated keys before the attention call. Its argument has had several names, so its type tells.
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        rotation = Rotation(*embeddings, waits=not cached, backend=site.backend)
        kwargs["position_embeddings"] = (rotation, rotation.sin)
        if rotation.waits:
            kwargs["seal_rotation"] = rotation
    return site.rotated(self, *args, **kwargs)


class Patch:
    """All changes to one model, put on and taken off together; ``sites`` in the order of the layers."""

    def __init__(self, sites: list[AttentionLayer]):
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
