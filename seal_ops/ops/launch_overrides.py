"""The backward of CUDA's kernels on a short sample, launched as on the rows that the sample stands for.

A thread block of the backward takes as many query heads of a group as leave enough thread blocks: few of a short row,
all of a long one (csrc/cuda/sm90/attention_backward.cu).  Heads that are apart leave their dK and dV as fp32 partial
sums.  On 132 multiprocessors, with 32 heads on 8 of 128 channels, that is 32 KiB a token of one row in 1,024 tokens,
half of it in 2,048, and nothing in 4,096.
"""

from __future__ import annotations

import contextlib

import torch

from .dispatch import extension


def enough_thread_blocks(multiprocessors: int) -> int:
    """Thread blocks that several heads to a block must leave, as the launch has it."""
    return 2 * multiprocessors - 8


def key_tiles(tokens: int, head_dim: int, sequences: int, packed: bool) -> int:
    """Tiles of keys of a call of ``tokens`` in all, in sequences of equal length, as the launch counts them."""
    rows = 128 if head_dim <= 128 else 64
    return tokens // rows + sequences if packed else sequences * -(-(tokens // sequences) // rows)


@contextlib.contextmanager
def launched_as(sample: int, real: int, device: torch.device):
    """Inside, a backward whose keys make ``sample`` tiles shares out the heads as one with ``real`` tiles does.

    Nothing happens without the CUDA kernels.  The setting is the process's: no other thread may launch meanwhile.

    Args:
        sample, real: `key_tiles` of the two calls, which are alike but for their length.
        device: where they run.
    """
    built = extension()
    if device.type != "cuda" or not hasattr(built, "set_launch_overrides"):
        yield
        return
    enough = enough_thread_blocks(torch.cuda.get_device_properties(device).multi_processor_count)
    # tiles * other >= enough for the real call, other being the same in both: rounded up, as sample * other is whole.
    built.set_launch_overrides(enough_ctas=max(1, -(-enough * sample // real)))
    try:
        yield
    finally:
        built.set_launch_overrides()
