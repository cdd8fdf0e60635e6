"""What `torch.utils.flop_counter.FlopCounterMode` counts for the attention ops: PyTorch's own formula for SDPA.

As there, only matrix products count, and every pair of a query and a key, whatever the mask: causal attention counts
twice what it needs, as SDPA's does, so that the counts of a model with and without scales are the same.  Packed
sequences count each by itself; where their lengths are not known (fake tensors), each as the longest, as there.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .autograd import bind

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
    from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

    forward = lambda shapes: sdpa_flop_count(*shapes)
    backward = lambda shapes: sdpa_backward_flop_count(shapes[0], *shapes)
    for name, count in (("attention", forward), ("rope_attention", forward), ("attention_backward", backward)):
        op = getattr(torch.ops.seal, name)
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(functools.partial(_flops, name, count))


def _flops(op: str, count: Callable[[tuple], int], *args, **kwargs) -> int:
    """``count`` of the shapes of each sequence of a call, whose arguments are those of the op's schema."""
    a = bind(op, args, kwargs)
    names = ("q", "k", "v", "cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k")
    return sum(map(count, _shapes(*(a[name] for name in names))))


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
