"""Attach, detach, disable and load the scales of one model.

SEAL (arXiv 2501.15225) multiplies the attention output, before ``o_proj``, by one learned factor per query head
("head", SEAL-H) or per channel ("channel", SEAL-C) in every layer; the model itself is frozen.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import torch
from torch import nn

from ..huggingface.discovery import find_attention_layers
from ..huggingface.patch import AttentionLayer, Patch
from ..ops.dispatch import choose
from .files import GRANULARITIES, ScalesConfig, read
from .scales import Scales

SUBMODULE = "seal_scales"


@dataclasses.dataclass(eq=False)
class Attachment:
    """How to bring the model back; lives in the scales' ``__dict__`` and is copied with the model."""
    seam: Patch
    trainable: set[str]
    keys_to_ignore_on_save: object


def attached(model: nn.Module, call: str) -> tuple[Scales, Attachment]:
    """The scales on ``model``; ValueError in the name of ``call`` where there are none."""
    scales = getattr(model, SUBMODULE, None)
    attachment = getattr(scales, "attachment", None)
    if not isinstance(scales, Scales) or attachment is None:
        raise ValueError(f"seal_ops.{call}: model must have scales attached, this {type(model).__name__} has none")
    return scales, attachment


def _base_config(model: nn.Module):
    return getattr(model, "config", None)


def _select(sites: list[AttentionLayer], layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(len(sites)))
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(sites):
        raise ValueError(f"seal_ops.attach: layers must be indices from 0 to {len(sites) - 1}, got {list(layers)}")
    return chosen


def refuse_second(model: nn.Module, call: str) -> None:
    """ValueError in the name of ``call`` where the model already has scales."""
    if any(isinstance(m, Scales) for m in model.modules()):
        raise ValueError(f"seal_ops.{call}: model already has scales attached; call seal_ops.detach(model) first")


def attach(model: nn.Module, granularity: str = "head", layers: Sequence[int] | None = None,
           backend: str | None = None) -> Scales:
    """Freezes ``model`` and gives its self-attention layers scales, all 1, that are its only trainable parameters.

    ``model``: a transformers model with loaded weights that calls attention through the attention registry.
    ``granularity``: "head" ([Hq] a layer) or "channel" ([Hq, D]).  ``layers``: indices of the layers that get scales
    (default: all); every layer runs the fused attention.  ``backend``: see `seal_ops.attention`.

    The model is run once on two tokens to observe sizes and structure.  Returns the `Scales`, also found as
    ``model.seal_scales``.  Raises ValueError, one sentence, for a model without a known seam or with terms that the
    scaled attention does not have, for scales already attached, and for a backend that cannot run.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"seal_ops.attach: granularity must be 'head' or 'channel', got {granularity!r}")
    refuse_second(model, "attach")
    return attach_to(model, find_attention_layers(model), granularity, layers, backend)


def attach_to(model: nn.Module, sites: list[AttentionLayer], granularity: str, layers: Sequence[int] | None,
              backend: str | None) -> Scales:
    """`attach`, for sites that are already found."""
    config = describe(model, sites, granularity, layers)
    if backend not in (None, "auto"):
        choose(backend, "attention", sites[0].device, sites[0].dtype, sites[0].head_dim)
    scales = Scales(config, [sites[i].device for i in config.layers])
    for index, site in enumerate(sites):
        site.backend = backend
        site.scaling = scales.layers[str(index)] if index in config.layers else None
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(False)
    setattr(model, SUBMODULE, scales)
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    scales.attachment = Attachment(Patch(sites), trainable, ignored)
    # transformers matches these names exactly
    model._keys_to_ignore_on_save = {*(ignored or ()), *(f"{SUBMODULE}.{n}" for n in scales.state_dict())}
    scales.attachment.seam.install()
    return scales


def describe(model: nn.Module, sites: list[AttentionLayer], granularity: str, layers: Sequence[int] | None = None) -> ScalesConfig:
    """The config that scales of this granularity would have on ``model``."""
    chosen = _select(sites, layers)
    base = _base_config(model)
    return ScalesConfig(granularity, tuple(chosen), tuple(sites[i].num_heads for i in chosen),
                        tuple(sites[i].head_dim for i in chosen), getattr(base, "model_type", None),
                        getattr(base, "_name_or_path", None) or None)


def detach(model: nn.Module) -> nn.Module:
    """Takes the scales off; the model is bit for bit what it was before `attach`, ``requires_grad`` flags included.

    The `Scales` object keeps its values and can still be saved.  Returns the model.
    """
    scales, attachment = attached(model, "detach")
    attachment.seam.remove()
    delattr(model, SUBMODULE)
    scales.attachment = None
    for name, p in model.named_parameters():
        p.requires_grad_(name in attachment.trainable)
    if attachment.keys_to_ignore_on_save is None:
        model.__dict__.pop("_keys_to_ignore_on_save", None)
    else:
        model._keys_to_ignore_on_save = attachment.keys_to_ignore_on_save
    return model


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside the block ``model`` computes exactly what it did before `attach`, with its own attention implementation."""
    _, attachment = attached(model, "disabled")
    seam, was_installed = attachment.seam, attachment.seam.installed
    seam.remove()
    try:
        yield model
    finally:
        # Not where the block detached or merged the model.
        if was_installed and getattr(getattr(model, SUBMODULE, None), "attachment", None) is attachment:
            seam.install()


def load(model: nn.Module, save_directory: str | os.PathLike, backend: str | None = None) -> Scales:
    """Attaches the scales saved in ``save_directory`` to ``model``; the reverse of `Scales.save_pretrained`.

    Everything is checked before the model is touched.  Returns the `Scales`.  Raises FileNotFoundError for a missing
    file and ValueError, one sentence, for a damaged file, an adapter made for another model, or tensors of another
    shape or dtype than the config says.
    """
    refuse_second(model, "load")
    config, tensors = read(save_directory)
    sites = find_attention_layers(model)
    check_fits(config, model, sites, os.fspath(save_directory))
    scales = attach_to(model, sites, config.granularity, config.layers, backend)
    with torch.no_grad():
        for layer, scale in scales.items():
            scale.copy_(tensors[f"layers.{layer}.scale"])
    return scales


def check_fits(config: ScalesConfig, model: nn.Module, sites: list[AttentionLayer], source: str) -> None:
    """ValueError where an adapter with this config was made for another model."""
    model_type = getattr(_base_config(model), "model_type", None)
    if config.model_type and model_type and config.model_type != model_type:
        raise ValueError(f"seal_ops.load: {source!r} must be an adapter for model type {model_type!r}, got one for "
                         f"{config.model_type!r}")
    if max(config.layers) >= len(sites):
        raise ValueError(f"seal_ops.load: {source!r} must be an adapter for {len(sites)} layers, got one with layer "
                         f"{max(config.layers)}")
    for layer, heads, head_dim in zip(config.layers, config.num_heads, config.head_dim):
        site = sites[layer]
        if (heads, head_dim) != (site.num_heads, site.head_dim):
            raise ValueError(f"seal_ops.load: {source!r} must be an adapter for {site.num_heads} heads of "
                             f"{site.head_dim} channels in layer {layer}, got one for {heads} heads of {head_dim}")
