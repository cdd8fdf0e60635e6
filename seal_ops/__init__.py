"""seal_ops: attention with learned head and channel scales, fused with rotary embedding, forward and backward.

The ops are `torch.ops.seal.*` (docs/ops.md); `attention`, `rope` and `rope_attention` here call them. `attach`,
`train`, `merge`, `evaluate` and `tasks` are SEAL (arXiv 2501.15225) for Hugging Face models; they are imported on first
use, so that the kernels cost no import of transformers.
"""

import importlib

from .ops import masks, position_programs
from .ops.dispatch import backends
from .ops.functional import attention, packed_positions, rope, rope_attention
from .ops.merging import merge_attention
from .ops.rotary_tables import rope_frequencies, rope_tables
from .version import __version__

# Public name -> the module that defines it; a name that ends its module's path is that module itself.
_LAZY = {
    "attach": "adapters.attachment", "detach": "adapters.attachment", "disabled": "adapters.attachment",
    "load": "adapters.attachment", "merge": "adapters.merging", "merge_checkpoint": "adapters.checkpoint_merging",
    "Scales": "adapters.scales",
    "SealCallback": "adapters.trainer_callback", "reference_model": "adapters.shared_weights",
    "update_card": "adapters.model_card", "card_results": "evaluation.model_card_results",
    "attach_weak_columns": "quantized.attachment", "detach_weak_columns": "quantized.attachment",
    "weak_columns_disabled": "quantized.attachment", "WeakColumns": "quantized.attachment",
    "save_quantized": "quantized.checkpoint", "load_weak_columns": "quantized.saving",
    "merge_weak_columns": "quantized.merging", "export_lora": "quantized.lora",
    "fold_scales": "quantized.folding", "parameter_groups": "training.groups",
    "ia3": "adapters.ia3", "tasks": "tasks", "train": "training.loop", "Collator": "training.collator",
    "plan": "training.memory_plan.planning",
    "evaluate": "evaluation.runner", "Evaluation": "evaluation.results", "statistics": "evaluation.statistics",
    "measure_head_importance": "experiments.head_importance", "quadrant_experiment": "experiments.quadrants",
    "HeadImportance": "experiments.head_importance", "group_by_sign": "experiments.quadrants",
    "extend": "huggingface.context_extension.extending", "unextend": "huggingface.context_extension.extending",
    "streaming_cache": "huggingface.context_extension.rolling_cache",
    "load_model": "huggingface.loading", "lm_eval": "evaluation.lm_eval",
    "compare": "experiments.comparison", "transfer": "experiments.transfer_matrix", "plots": "report.plots",
}  # fmt: skip
__all__ = [
    "__version__", "attention", "backends", "masks", "merge_attention", "packed_positions", "position_programs",  # noqa: E501
    "rope", "rope_attention", "rope_frequencies", "rope_tables",
    *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'seal_ops' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    found = module if _LAZY[name].rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
