"""Weak columns and their 4-bit base as one plain model in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import bases, quantizers
from .attachment import bring_up_to_date, attached, detach_weak_columns


@torch.no_grad()
def merge_weak_columns(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes every layer with weak columns a plain linear layer in 16 bits that computes the same, and detaches.

    Quantised layers without weak columns are written out too, so that the model can be saved as an ordinary
    checkpoint.  The sum is made in fp32 and rounded once.  ``dtype``: of the weights; None for what the base computes
    in.  Needs the memory of the 16-bit model.  Returns the model.  Raises ValueError where it has no weak columns, and
    where a merged weight would overflow.
    """
    found = attached(model, "merge_weak_columns")
    owner = found.owner
    plain = {name: _plain(module, name, dtype) for name, module in found.layers.items()}
    detach_weak_columns(model)
    for name, module in plain.items():
        quantizers.replace(owner, name, module)
    for name, module in list(owner.named_modules()):
        if bases.is_nf4(module) or bases.is_hqq(module):
            quantizers.replace(owner, name, linear_like(bases.weight_of(module), module, dtype))
    bring_up_to_date(owner)
    _forget_quantisation(owner)
    return model


def merged_weight(module: nn.Module) -> Tensor:
    """fp32 (fp64) weight [out, in] of a layer with its weak columns."""
    weight = bases.weight_of(module)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return weight.index_add_(1, module.column_index, module.column_delta.detach().to(weight.dtype))


def _plain(module: nn.Module, name: str, dtype: torch.dtype | None) -> nn.Linear:
    made = linear_like(merged_weight(module), module, dtype or bases.weight_of(module).dtype)
    if not bool(torch.isfinite(made.weight).all()):
        raise ValueError(
            f"seal_ops.merge_weak_columns: {name} must stay finite in {made.weight.dtype}, got columns that overflow it"
        )
    return made


def linear_like(weight: Tensor, like: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    """A plain layer with this weight, and the bias of ``like``."""
    dtype, (columns, rows) = dtype or weight.dtype, bases.sizes(like)
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(dtype))
    bias = getattr(like, "bias", None)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype))
    return made.train(like.training)


def _forget_quantisation(owner: nn.Module) -> None:
    """What transformers keeps of a model that it has loaded in 4 bits: its checkpoints would say so."""
    quantizer = getattr(owner, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(owner)
    elif getattr(getattr(owner, "config", None), "quantization_config", None) is not None:
        del owner.config.quantization_config
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if owner.__dict__.get(name):
            setattr(owner, name, False)
