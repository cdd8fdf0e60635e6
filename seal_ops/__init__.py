"""seal_ops: attention with learned head and channel scales, fused with rotary embedding, forward and backward.

The ops are `torch.ops.seal.*` (docs/ops.md); `attention`, `rope` and `rope_attention` here call them. `attach`, `train`,
`merge`, `evaluate` and `tasks` are SEAL (arXiv 2501.15225) for Hugging Face models; they are imported on first use, so that
the kernels cost no import of transformers.
"""
import importlib

from .backends import backends
from .evaluate import evaluate
from .ops import attention, packed_positions, rope, rope_attention
from .rope_scaling import rope_frequencies, rope_tables
from .train import train  # like evaluate and backends not lazy: a later import of the submodule would take its name

from .version import __version__

_LAZY = {
    "attach": "scales", "detach": "scales", "disabled": "scales", "merge": "scales", "load": "scales", "Scales": "scales",
    "tasks": None, "peft": None, "heads": None,
}
__all__ = ["attention", "backends", "evaluate", "packed_positions", "rope", "rope_attention", "rope_frequencies", "rope_tables", "train", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'seal_ops' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name] or name}", __name__)
    found = module if _LAZY[name] is None else getattr(module, name)
    globals()[name] = found
    return found
