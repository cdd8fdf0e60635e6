"""Tile sizes: a table picked from measurement, and a bounded search for those who ask (SEAL_TRITON_AUTOTUNE=1).

A choice depends on the kernel, the element size and the padded head_dim, never on the sequence length, so a new length
compiles nothing. Where a tile does not fit a GPU's shared memory the next smaller one of its list is taken and
remembered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from .host import padded_head_dim, uses_tma


@dataclass(frozen=True)
class Tile:
    """Query rows, keys, warps and pipeline stages of one program; a limit of registers a thread where one pays."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict:
        limit = (
            {} if self.registers is None else dict(maxnreg=self.registers)
        )  # a name that only NVIDIA's compiler knows
        return dict(num_warps=self.warps, num_stages=self.stages, **limit)


# Best first on an H200 (docs/kernel_notes_triton.md); what follows is for GPUs with less shared memory. The best have
# four warps: two programs then share a multiprocessor, and one's softmax runs beside the other's matrix products.
_HOPPER = {
    "forward": {
        32: [Tile(128, 128, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)],
        64: [Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)],
        128: [Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)],
        256: [Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
    },
    "dkdv": {
        64: [Tile(64, 64, 4, 2, 168), Tile(32, 32, 4, 1)],
        128: [Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)],
    },
    "dk": {256: [Tile(32, 128, 8, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)]},
    "dv": {256: [Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)]},
    "dq": {
        64: [Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)],
        128: [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
        256: [Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
    },
}
# Scaled, the grad_out tile is multiplied in registers and stays there, so that two programs with a third stage fill a
# multiprocessor's 228 KB to the last byte; packed sequences need a few bytes more, and then it would hold one program
# alone.
_HOPPER["dq_scaled"] = {**_HOPPER["dq"], 128: [Tile(64, 64, 4, 3), *_HOPPER["dq"][128]]}
# Decoding, by the rows of a tile: as many bytes in flight as fit twice into a multiprocessor's shared memory.
_DECODE = {
    f"decode{m}": {
        64: [Tile(m, 128, 4, 3), Tile(m, 64, 4, 2), Tile(m, 32, 4, 2)],
        128: [Tile(m, 64, 4, 3), Tile(m, 64, 4, 2), Tile(m, 32, 4, 2)],
        256: [Tile(m, 32, 4, 3), Tile(m, 32, 4, 2), Tile(m, 16, 4, 2)],
    }
    for m in (16, 32, 64)
}
_HOPPER |= _DECODE
# GPUs whose matrix products take their operands from registers (sm_8x, sm_120): chosen by what compiles with few or no
# spills (tests/compile_triton_targets.py), not measured.
_OPERANDS_IN_REGISTERS = {
    "forward": {
        64: [Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)],
        128: [Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
        256: [Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)],
    },
    "dkdv": {
        64: [Tile(64, 64, 8, 2), Tile(32, 32, 4, 1)],
        128: [Tile(64, 64, 8, 2), Tile(32, 32, 4, 1)],
    },
    "dk": {256: [Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)]},
    "dv": {256: [Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)]},
    "dq": {
        64: [Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
        128: [Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)],
        256: [Tile(64, 32, 8, 1), Tile(32, 16, 4, 1)],
    },
}
_OPERANDS_IN_REGISTERS["dq_scaled"] = _OPERANDS_IN_REGISTERS["dq"]
_OPERANDS_IN_REGISTERS |= _DECODE
# fp32 has no exact tensor-core product: fused multiply-adds, whose unrolled code limits the tile (compile time,
# registers).
_FULL = {64: [Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)], 128: [Tile(16, 16, 8, 1)]}
_INTERPRETED = [Tile(32, 32, 4, 1)]  # the interpreter's time goes by the number of operations, not their size

_chosen: dict[tuple, Tile] = {}


def tiles(kernel: str, element_size: int, head_dim: int, tma: bool) -> list[Tile]:
    """Tiles for a kernel, best first; `tma`: what host.uses_tma says of the GPU."""
    table = _FULL if element_size == 4 else (_HOPPER if tma else _OPERANDS_IN_REGISTERS)[kernel]
    return table[min(max(min(table), padded_head_dim(head_dim)), max(table))]


def candidates(kernel: str, like: Tensor) -> list[Tile]:
    """Tiles for a kernel on q of this element type, head_dim and device, best first."""
    return tiles(kernel, like.element_size(), like.shape[-1], uses_tma(like)) if like.is_cuda else _INTERPRETED


def split(like: Tensor) -> bool:
    """Whether dK and dV take a kernel each ("dk" and "dv" instead of "dkdv"). At head_dim 256 two accumulators leave no
    room for anything else, and five matrix products that fit are faster than four that do not."""
    return padded_head_dim(like.shape[-1]) > 128


def autotune() -> bool:
    return os.environ.get("SEAL_TRITON_AUTOTUNE", "0") == "1"


def choose(kernel: str, like: Tensor, launch, size: int | None = None) -> Tile:
    """Runs launch(tile) with the tile for this kernel, element type, head_dim and device; returns that tile. `size`: of
    which its sides have to be divisors (block lists)."""
    key = (kernel, like.dtype, padded_head_dim(like.shape[-1]), like.device, size)
    if key in _chosen and _fits(launch, _chosen[key]):
        return _chosen[key]
    whole = (tile for tile in candidates(kernel, like) if size is None or size % tile.m == size % tile.n == 0)
    fitting = (tile for tile in whole if _fits(launch, tile))
    if autotune() and like.is_cuda:
        median = lambda tile: do_bench(lambda: launch(tile), warmup=10, rep=40, return_mode="median")
        tile = min(fitting, key=median, default=None)
        if tile is not None:
            launch(tile)  # the last launch decides what the caller sees
    else:
        tile = next(fitting, None)
    if tile is None:
        raise RuntimeError(
            f"Triton kernel {kernel}: no tile for head_dim {like.shape[-1]} and {like.dtype} fits the shared "
            f"memory of {torch.cuda.get_device_name(like.device) if like.is_cuda else like.device}"
        )
    _chosen[key] = tile
    return tile


def _fits(launch, tile: Tile) -> bool:
    """Launches; False where the tile needs more shared memory than there is."""
    try:
        launch(tile)
    except OutOfResources:
        return False
    return True
