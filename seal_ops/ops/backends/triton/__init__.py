"""The Triton backend: the ops on any GPU that Triton supports, with no compiler installed.

Importing this package does not import Triton; the first call does. Under TRITON_INTERPRET=1 (set before that first
call) the same kernels run on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch

HEAD_DIMS = (16, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(
    op: str, dtype: torch.dtype | None = None, head_dim: int | None = None, device: torch.device | str | None = None
) -> str | None:
    """One sentence saying why this backend cannot run seal::`op` on such tensors, or None if it can. What is not given
    is not asked about."""
    if importlib.util.find_spec("triton") is None:
        return "backend triton: triton is not installed (pip install triton)"
    if device is not None and torch.device(device).type != "cuda" and not interpreted():
        return f"backend triton runs on GPU tensors (or on the CPU with TRITON_INTERPRET=1), got {device}"
    if op.startswith("merge_attention"):  # a pass over rows of any length and any floating dtype
        return None
    if dtype is not None and dtype not in DTYPES:
        return f"backend triton takes bfloat16, float16 and float32, got {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and op != "rope" and not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"backend triton takes a head_dim of {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {head_dim}"
    return None


def attention(*args, **kwargs):
    """seal::attention; returns (out, lse)."""
    from .forward import attention

    return attention(*args, **kwargs)


def attention_backward(*args, **kwargs):
    """seal::attention_backward; returns the gradients of q, k, v, scale and offset."""
    from .backward import attention_backward

    return attention_backward(*args, **kwargs)


def rope(*args, **kwargs):
    """seal::rope; returns (q_rotated, k_rotated)."""
    from .rotary import rope

    return rope(*args, **kwargs)


def rope_attention(
    q, k, v, cos, sin, positions=None, positions_k=None, scale=None, offset=None, *, interleaved=False, **arguments
):
    """seal::rope_attention; returns (out, lse, q_rotated, k_rotated)."""
    q_rotated, k_rotated = rope(q, k, cos, sin, positions, positions_k, interleaved=interleaved)
    return (*attention(q_rotated, k_rotated, v, scale, offset, **arguments), q_rotated, k_rotated)


def merge_attention(*args, **kwargs):
    """seal::merge_attention; returns (out, lse)."""
    from .merge import merge_attention

    return merge_attention(*args, **kwargs)


def merge_attention_backward(*args, **kwargs):
    """seal::merge_attention_backward; returns the gradients of the outputs and of the log-sum-exps, stacked."""
    from .merge import merge_attention_backward

    return merge_attention_backward(*args, **kwargs)
