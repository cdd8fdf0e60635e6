"""What `torch.utils.flop_counter.FlopCounterMode` counts for the attention ops: PyTorch's own formula for SDPA.

As there, only matrix products count, and every pair of a query and a key, whatever the mask: causal attention counts
twice what it needs, as SDPA's does, so that the counts of a model with and without scales are the same.  Packed
sequences count each by itself; where their lengths are not known (fake tensors), each as the longest, as there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"


def register_flops() -> None:
    """Registers the formulas now, or when PyTorch's counter is imported: it imports Triton, which takes its time."""
    if _COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """Lets the counter be found as ever, and registers behind its own import."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from torch.utils.flop_counter import (
        flop_registry,
        register_flop_formula,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    seal = torch.ops.seal
    if seal.attention in flop_registry:
        return

    def forward(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k):
        return sum(
            sdpa_flop_count(*shapes) for shapes in _shapes(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        )

    @register_flop_formula(seal.attention, get_raw=True)
    def attention(
        q, k, v, scale=None, offset=None, cu_seqlens=None, cu_seqlens_k=None, *, max_seqlen=None, max_seqlen_k=None,
        **others,
    ) -> int:  # fmt: skip
        return forward(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)

    @register_flop_formula(seal.rope_attention, get_raw=True)
    def rope_attention(
        q, k, v, cos, sin, positions=None, positions_k=None, scale=None, offset=None, cu_seqlens=None,
        cu_seqlens_k=None, *, max_seqlen=None, max_seqlen_k=None, **others,
    ) -> int:  # fmt: skip
        return forward(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)

    @register_flop_formula(seal.attention_backward, get_raw=True)
    def attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, scale=None, offset=None, cos=None, sin=None, positions=None,
        positions_k=None, cu_seqlens=None, cu_seqlens_k=None, *, max_seqlen=None, max_seqlen_k=None, **others,
    ) -> int:  # fmt: skip
        return sum(
            sdpa_backward_flop_count(shapes[0], *shapes)
            for shapes in _shapes(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        )


def _shapes(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k):
    """Yields the shapes [B, H, S, D] of q, k and v, one sequence after the other where they are packed. Keys get the
    heads of the queries, which is what is counted: the formula of torch 2.11 refuses others."""
    heads = q.shape[-2]
    if cu_seqlens is None:
        yield tuple((t.shape[0], heads, t.shape[1], t.shape[3]) for t in (q, k, v))
        return
    keys = _lengths(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, max_seqlen_k or max_seqlen or k.shape[0])
    for sq, sk in zip(_lengths(cu_seqlens, max_seqlen or q.shape[0]), keys, strict=True):
        yield (1, heads, sq, q.shape[2]), (1, heads, sk, k.shape[2]), (1, heads, sk, v.shape[2])


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(cu_seqlens, (FakeTensor, FunctionalTensor)) or cu_seqlens.is_meta:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()
