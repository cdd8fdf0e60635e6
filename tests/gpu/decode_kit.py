"""The CUDA decode kernels with splits or configurations that the op would not choose; nvcc builds decode_kit.cu."""

from __future__ import annotations

import ctypes
import functools
import math
import pathlib
import subprocess
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from seal_ops.ops import factors

HERE = pathlib.Path(__file__).parent
# The template arguments of DecodeConfig after type and masking (csrc/cuda/sm90/decode_kernel.cuh).
Variant = tuple[int, ...]


@functools.cache
def build(variants: tuple[Variant, ...] = ()) -> ctypes.CDLL:
    """About 20 seconds, and half a second a variant."""
    library = pathlib.Path(tempfile.mkdtemp()) / "decode_kit.so"
    header = library.with_suffix(".h")  # nvcc would take the commas of a -D for its own
    header.write_text("#define KIT_VARIANTS " + " ".join(f"V({', '.join(map(str, v))})" for v in variants) + "\n")
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-O3",
            "-DNDEBUG",
            "-lineinfo",
            "--expt-relaxed-constexpr",
            "-Xcompiler",
            "-fPIC",
            "-shared",
            f"-I{HERE.parents[1] / 'csrc'}",
            "-include",
            header,
            "-o",
            library,
            HERE / "decode_kit.cu",
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def _tensor(t: Tensor) -> list[int]:
    packed = t.dim() == 3
    sizes = [1, *t.shape[:2]] if packed else list(t.shape[:3])
    return sizes + ([0, *t.stride()[:2]] if packed else list(t.stride()[:3]))


def _factor(t: Tensor | None, heads: int, head_dim: int) -> list[int]:
    if t is None:
        return [0, 0, 0]
    view = factors.full_view(t, heads, head_dim)
    return [s if n > 1 else 0 for n, s in zip(view.shape, view.stride())]


def prepare(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    splits: int = 0,
    variant: int = -1,
) -> tuple[Callable[[], None], Tensor, Tensor, dict[str, int]]:
    """A function that launches the kernels and nothing else, the out and lse that it fills (NaN until then, as the
    workspace), and the plan. Arguments as seal_ops.attention; `splits` 0: what the op chooses; `variant` -1: the
    table's configuration."""
    packed = cu_seqlens is not None
    heads, head_dim = q.shape[-2:]
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((*q.shape[:-3], heads, q.shape[-3]), torch.nan, device=q.device)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    left = -1 if window is None else window - 1
    right = 0 if causal else left
    sequences = cu_seqlens.numel() - 1 if packed else q.shape[0]
    numbers = (
        [n for t in (q, k, v, out) for n in _tensor(t)]
        + _factor(scale, heads, head_dim)
        + _factor(offset, heads, head_dim)
    )
    numbers += [sequences, head_dim, left, right, q.dtype == torch.float16, max_seqlen or q.shape[-3], splits, variant]
    plan = (ctypes.c_int64 * 4)()

    def call(workspace: Tensor | None, plan_only: bool = False) -> None:
        pointers = [
            None if t is None else t.data_ptr() for t in (q, k, v, out, lse, scale, offset, cu_seqlens, cu_k, workspace)
        ]
        all_numbers = [*numbers, plan_only]
        status = library.kit_decode(
            (ctypes.c_void_p * 10)(*pointers),
            (ctypes.c_int64 * len(all_numbers))(*all_numbers),
            ctypes.c_float(1 / math.sqrt(head_dim)),
            plan,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        assert status == 0, f"CUDA error {status}"

    call(None, plan_only=True)
    workspace = torch.full((plan[3] // 4,), torch.nan, device=q.device) if plan[3] > 0 else None
    return lambda: call(workspace), out, lse, dict(zip(("row_tiles", "row_blocks", "splits", "workspace_bytes"), plan))


def decode(*args, **kwargs) -> tuple[Tensor, Tensor, dict[str, int]]:
    """out, lse and the plan of one call; arguments as `prepare`."""
    call, out, lse, plan = prepare(*args, **kwargs)
    call()
    return out, lse, plan
