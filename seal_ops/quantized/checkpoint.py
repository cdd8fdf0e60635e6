"""A model that was quantised here as a 4-bit checkpoint that transformers loads, with its weak columns beside it."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..huggingface.wrappers import unwrapped
from . import bases
from .attachment import ATTRIBUTE, detach_weak_columns


def save_quantized(model: nn.Module, save_directory: str | os.PathLike, tokenizer=None) -> nn.Module:
    """Writes an NF4 model as a checkpoint for ``from_pretrained``, and its weak columns beside it; takes these off.

    ``load_weak_columns(model, folder)`` puts them on the model that ``from_pretrained(folder)`` gives.

    Args:
        model: with layers in NF4.
        save_directory: the folder.
        tokenizer: saved with the model, where it is given.

    Returns:
        The model, without weak columns.

    Raises:
        ValueError: no layer is in NF4, or layers of HQQ's are in the model, which transformers does not write.
    """
    from transformers import BitsAndBytesConfig

    call = "save_quantized"
    owner = unwrapped(model, call)
    if any(bases.is_hqq(m) for m in owner.modules()):
        raise ValueError(f"seal_ops.{call}: model must be in NF4, got layers of HQQ, which transformers does not write")
    layers = {name: m for name, m in owner.named_modules() if bases.is_base(m)}
    packed = [m for m in layers.values() if bases.is_nf4(m)]
    if not packed:
        raise ValueError(f"seal_ops.{call}: model must have layers in NF4, got none in {type(owner).__name__}")
    columns = owner.__dict__.get(ATTRIBUTE)
    if columns is not None:
        columns.save_pretrained(save_directory)
        detach_weak_columns(model)
    state = packed[0].weight.quant_state
    owner.config.dtype = state.dtype
    owner.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=state.quant_type,
        bnb_4bit_compute_dtype=state.dtype,
        bnb_4bit_use_double_quant=state.nested,
        llm_int8_skip_modules=[name for name, m in layers.items() if not bases.is_nf4(m)],
    )
    with torch.no_grad():
        owner.save_pretrained(save_directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(save_directory)
    return model
