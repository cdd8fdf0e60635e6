"""Weak columns and their 4-bit base as one plain model in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import bases, quantizers
from .attachment import attached, bring_up_to_date, detach_weak_columns


@torch.no_grad()
def merge_weak_columns(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes every layer with weak columns a plain linear layer in 16 bits that computes the same, and detaches.

    Quantised layers without weak columns are written out too, so that the model can be saved as an ordinary
    checkpoint.  The sum is made in fp32 and rounded once.  Needs the memory of the 16-bit model.

    Args:
        model: with weak columns attached.
        dtype: of the weights; None for what the base computes in.

    Returns:
        The model, without weak columns.

    Raises:
        ValueError: no weak columns on the model, a merged weight that would overflow, or experts in GGUF blocks.
    """
    found = attached(model, "merge_weak_columns")
    owner = found.owner
    for name, module in owner.named_modules():
        if type(module).__name__ == "GgufExperts":
            raise ValueError(
                f"seal_ops.merge_weak_columns: model must be made of linear layers and embeddings, got experts that "
                f"stay in GGUF blocks ({name}); load the file with GgufConfig(dequantize=True) instead"
            )
    usual = bases.computes_in(owner)
    merged = {name: _merged(module, name, usual, dtype) for name, module in found.layers.items()}
    detach_weak_columns(model)
    for name, weight in merged.items():
        module = owner.get_submodule(name)
        if bases.is_plain(module) and module.weight.dtype == weight.dtype:
            module.weight.copy_(weight)  # the parameter itself, with its flag
        else:
            quantizers.replace(owner, name, linear_like(weight, module))
    for name, module in list(owner.named_modules()):
        table = bases.table_of(module)
        if table is not None:
            made = nn.Embedding.from_pretrained(table.to(dtype or table.dtype))
            quantizers.replace(owner, name, made.train(module.training))
        elif bases.is_packed(module):
            weight = bases.weight_of(module, usual)
            quantizers.replace(owner, name, linear_like(weight.to(dtype or weight.dtype), module))
    bring_up_to_date(owner)
    _forget_quantisation(owner)
    return model


def _merged(module: nn.Module, name: str, usual: torch.dtype, dtype: torch.dtype | None) -> Tensor:
    """The weight [out, in] of a layer with its weak columns.  Blocks of GGUF are read in ``usual``, as the layer reads
    them: a block's factor is rounded then before it multiplies."""
    weight = bases.weight_of(module, usual)
    both = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    both.index_add_(1, module.column_index, module.column_delta.detach().to(both.dtype))
    both = both.to(dtype or weight.dtype)
    if not bool(torch.isfinite(both).all()):
        raise ValueError(
            f"seal_ops.merge_weak_columns: {name} must stay finite in {both.dtype}, got columns that overflow it"
        )
    return both


def linear_like(weight: Tensor, like: nn.Module) -> nn.Linear:
    """A frozen plain layer with this weight, and the bias of ``like``."""
    columns, rows = bases.sizes(like)
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    bias = getattr(like, "bias", None)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
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
