"""Weak columns as a LoRA adapter of PEFT: its A picks the columns, its B is the trained difference."""

from __future__ import annotations

import os
from collections import Counter

import torch
from torch import nn

from ..adapters.files import CONFIG_FILE, WEIGHTS_FILE
from ..utils.files import write_adapter
from . import bases
from .attachment import attached

_PREFIX = "base_model.model."


def export_lora(model: nn.Module, save_directory: str | os.PathLike) -> None:
    """Writes the weak columns of ``model`` as a LoRA that ``peft.PeftModel.from_pretrained(base, folder)`` reads.

    Rank and alpha are the number of columns, so that the factor is 1; ``lora_A`` [k, in] is one-hot (bf16, which holds
    it exactly), ``lora_B`` [out, k] the difference.  The base is the model in the same 4 bits, without weak columns.

    Args:
        model: with weak columns attached.
        save_directory: gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: no weak columns on the model.

    Source:
        LoRA (arXiv 2106.09685), whose form the product has.
    """
    found = attached(model, "export_lora")
    tensors, ranks = {}, {}
    for name, module in found.layers.items():
        index, delta = module.column_index.cpu(), module.column_delta.detach().cpu()
        columns, _ = bases.sizes(module)
        one_hot = torch.zeros(len(index), columns, dtype=torch.bfloat16, device="cpu")
        one_hot[torch.arange(len(index), device="cpu"), index] = 1
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = one_hot
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = delta.contiguous()
        ranks[name] = len(index)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: k for name, k in ranks.items() if k != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": found.config.base_model_name_or_path,
        "revision": None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
    }
    folder = os.fspath(save_directory)
    write_adapter(folder, (WEIGHTS_FILE, tensors), (CONFIG_FILE, config))
