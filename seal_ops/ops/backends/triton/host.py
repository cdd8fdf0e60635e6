"""What the launchers share on the host: the geometry of a call, tensor descriptors, scale and offset as strides."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import factors
from ...masks import UNBOUNDED
from ...visibility import Visibility
from . import interpreted
from .tiling import LOG2E

if interpreted():
    from .interpreter import repair

    repair()


def on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def products_from_shared_memory(major: int) -> bool:
    """Whether matrix products of this major compute capability read their operands from shared memory (wgmma, tcgen05):
    Hopper and the Blackwell of data centres, not the Blackwell of graphics cards (12). Elsewhere operands take
    registers."""
    return 9 <= major < 12


@functools.cache
def _capability(device: torch.device) -> int:
    """The major number of an NVIDIA GPU's compute capability; 0 for others."""
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def uses_tma(tensor: Tensor) -> bool:
    """Whether tiles come through tensor descriptors: where products read shared memory, and in the interpreter. Before
    Hopper Triton would turn descriptors into loads of single elements; sm_120 has TMA, but tiles that come through it
    spill there. So pointers serve elsewhere. SEAL_TRITON_TMA=0 asks for them everywhere."""
    if os.environ.get("SEAL_TRITON_TMA", "1") == "0":
        return False
    return not tensor.is_cuda or products_from_shared_memory(_capability(tensor.device))


@dataclass(frozen=True)
class Geometry:
    """Sizes and mask of one attention call. Lengths are those of a batch row, or of all packed sequences together."""

    batch: int  # batch rows of the tensors (1 if packed)
    num_seqs: int  # batch rows, or packed sequences
    len_q: int
    len_k: int
    heads: int
    kv_heads: int
    head_dim: int
    sigma: float
    seen: Visibility
    cu_q: Tensor | None
    cu_k: Tensor | None
    softcap: float | None = None

    @classmethod
    def of(cls, q, k, softmax_scale, causal, window, mask, cu_seqlens, cu_seqlens_k, softcap=None) -> Geometry:
        head_dim = q.shape[-1]
        packed = cu_seqlens is not None
        return cls(
            1 if packed else q.shape[0],
            cu_seqlens.numel() - 1 if packed else q.shape[0],
            q.shape[-3],
            k.shape[-3],
            q.shape[-2],
            k.shape[-2],
            head_dim,
            1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale,
            Visibility.of(causal, window, mask),
            cu_seqlens if packed else None,
            (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k) if packed else None,
            softcap,
        )

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def qk_scale(self) -> float:
        """What a kernel multiplies q k^T by: to scores in base 2, or with a soft cap to the argument of terms.bent."""
        return self.sigma * LOG2E if self.softcap is None else 2 * LOG2E * self.sigma / self.softcap

    @property
    def cap(self) -> float | None:
        """The soft cap in base 2."""
        return None if self.softcap is None else self.softcap * LOG2E

    @property
    def positive(self) -> bool:
        """Whether the largest score of a row is `qk_scale` times the largest of q k^T."""
        return self.sigma > 0 and self.softcap is None

    @property
    def mask(self) -> tuple[int | None, ...]:
        """The mask as the kernels take it: None for what it does not have."""
        lower, upper, chunk, chunk_lower, chunk_upper, shift, shifted_from, sinks = self.seen
        limit = lambda value, there=True: value if there and abs(value) < UNBOUNDED else None
        shifted = bool(chunk and shift and shifted_from < self.heads)
        return (
            limit(lower),
            limit(upper),
            chunk or None,
            limit(chunk_lower, chunk > 0),
            limit(chunk_upper, chunk > 0),
            shift if shifted else None,
            shifted_from if shifted else None,
            sinks or None,
        )

    def tiles(self, length: int, block: int) -> int:
        """Tiles of one batch row, or an upper bound of the tiles of all packed sequences (tiling.py)."""
        return length // block + self.num_seqs if self.packed else triton.cdiv(length, block)

    def programs(self, length: int, block: int, heads: int) -> int:
        return self.tiles(length, block) * heads * self.batch

    def reduce_factor(self, per_seq: Tensor, like: Tensor) -> Tensor:
        return factors.reduce_to(per_seq, like).to(like.dtype)


class BlockLists:
    """The blocks of masks.blocks that hold a pair that the mask shows, as lists for the kernels: for a block of queries
    the blocks of keys that it visits, and transposed. Made on the device, without a sync; their memory is that of
    `blocks` times four."""

    def __init__(self, blocks: Tensor, size: int, geometry: Geometry):
        cover = geometry.seen.cover(geometry.len_q, geometry.len_k, size, geometry.heads, blocks.device)
        self.size, self._visited = size, blocks & cover

    @functools.cached_property
    def of_keys(self) -> tuple:
        return self._lists(self._visited)

    @functools.cached_property
    def of_queries(self) -> tuple:
        return self._lists(self._visited.transpose(2, 3))

    def _lists(self, visited: Tensor) -> tuple:
        """What walk.listed reads: lists, their lengths, strides over batch rows and heads in lists, elements a list,
        size."""
        rows, heads, count, columns = visited.shape
        order = visited.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        strides = (heads * count if rows > 1 else 0, count if heads > 1 else 0)
        return order.contiguous(), visited.sum(-1, dtype=torch.int32).contiguous(), *strides, columns, self.size


class Rows:
    """A [B, S, H, D] view of q, k, v or grad_out that tensor descriptors accept: base and strides in multiples of 16
    bytes.
    A tensor that is not so is copied once, each row padded to 16 bytes."""

    def __init__(self, tensor: Tensor):
        x = tensor if tensor.dim() == 4 else tensor[None]
        unit = 16 // x.element_size()
        aligned = (
            x.stride(3) == 1
            and x.data_ptr() % 16 == 0
            and all(n == 1 or (s % unit == 0 and s > 0) for n, s in zip(x.shape[:3], x.stride()[:3]))
        )
        if not aligned:
            padded = x.new_empty(*x.shape[:3], -(-x.shape[3] // unit) * unit)
            x = padded[..., : x.shape[3]].copy_(x)
        self.tensor = x
        # The stride of a dimension of one element is arbitrary in PyTorch and checked by the hardware.
        self.strides = [s if n > 1 else unit for n, s in zip(x.shape[:3], x.stride()[:3])] + [1]

    def source(self, rows: int):
        """What tiling.load_rows reads tiles of `rows` tokens of one head from: a descriptor over [B, H, S, D] (with the
        unit dimensions in front the compiler drops them, and a tile goes from memory to the matrix units without
        passing through registers), or without TMA the tensor and its strides over batch, heads and tokens."""
        batch, length, heads, head_dim = self.tensor.shape
        b, s, h, _ = self.strides
        if not uses_tma(self.tensor):
            return self.tensor, b, h, s
        return TensorDescriptor(
            self.tensor, [batch, heads, length, head_dim], [b, h, s, 1], [1, 1, rows, padded_head_dim(head_dim)]
        )


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Over batch, tokens and heads of [B, S, H, D] or packed [T, H, D]; zeros for None."""
    return (0, 0, 0) if x is None else x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def factor_arguments(factor: Tensor | None, geometry: Geometry) -> tuple | None:
    """What tiling.load_factor reads: the tensor and its strides over sequences, heads and channels, 0 where it
    broadcasts."""
    if factor is None:
        return None
    view = factors.full_view(factor, geometry.heads, geometry.head_dim)
    return view, *(s if n > 1 else 0 for n, s in zip(view.shape, view.stride()))


def gate_arguments(gate: Tensor | None) -> tuple | None:
    """What terms.load_gate reads. Without a stride over channels where a head has one value: a None in the tuple is
    more than Triton 3.6 can compile."""
    if gate is None:
        return None
    view = gate if gate.dim() == 4 else gate[None]
    *others, channels = view.stride()
    return (gate, *others) if view.shape[-1] == 1 else (gate, *others, channels)


def per_sequence(factor: Tensor, geometry: Geometry) -> bool:
    return factors.full_view(factor, geometry.heads, geometry.head_dim).shape[0] > 1
