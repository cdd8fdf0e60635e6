"""The rotary embedding inside an attention module: recognised by what it computes, replaced by the fused one."""
from __future__ import annotations

import functools
import inspect
import types

import torch
from torch import Tensor, nn

from ..ops.functional import rope


class Rotation:
    """cos and sin on their way through a module's forward.

    With ``waits`` the rotation is left to the attention call, and q and k are kept to see that it gets the same.
    """

    def __init__(self, cos: Tensor, sin: Tensor, waits: bool, backend: str | None):
        self.cos, self.sin = _halves(cos, sin)
        self.waits, self.backend = waits, backend
        self.q = self.k = None

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, S, Hq, D] and k [B, S, Hkv, D], rotated."""
        return rope(q, k, self.cos, self.sin, backend=self.backend)


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, R/2] of transformers' [B, S, R], whose two halves are equal where pairs are (c, c + R/2)."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _rotate(q, k, cos, sin, unsqueeze_dim=1):
    """Takes the place of a model's half-split ``apply_rotary_pos_emb``; q [B, Hq, S, D], k [B, Hkv, S, D]."""
    rotation = cos if isinstance(cos, Rotation) else Rotation(cos, sin, waits=False, backend=None)
    if rotation.waits:
        rotation.q, rotation.k = q, k
        return q, k
    if unsqueeze_dim == 1:
        q, k = rotation.apply(q.transpose(1, 2), k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)
    return rotation.apply(q, k)


@functools.lru_cache(maxsize=None)
def _is_half_split(function) -> bool:
    """Whether ``function(q, k, cos, sin)`` is the half-split rotation, also where only the first R < D channels turn."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    matches = []
    for rotary_dim in (8, 4):
        angle = torch.randn(1, 3, rotary_dim // 2, generator=generator)
        cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        try:
            got = function(q, k, cos, sin)
        except Exception:  # another signature, or a function that cannot turn part of the channels
            matches.append(None)
            continue
        expected = _rotate(q, k, cos, sin)
        matches.append(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected)))
    return matches[0] is True and matches[1] is not False


def with_fused_rotation(module: nn.Module) -> types.FunctionType | None:
    """The module's own forward with its rotary function replaced, or None where it has no such seam.

    The forward keeps its code; only the name of the rotary function resolves to `_rotate`, in this copy alone, so
    neither the class nor its file is touched.
    """
    forward = inspect.unwrap(type(module).forward)  # under transformers' decorators
    if "forward" in module.__dict__ or not isinstance(forward, types.FunctionType):
        return None  # hooked by another library
    names = [n for n in forward.__code__.co_names if "rotary" in n and callable(forward.__globals__.get(n))]
    if len(names) != 1 or not _is_half_split(forward.__globals__[names[0]]):
        return None
    scope = {**forward.__globals__, names[0]: _rotate}
    # torch.compile looks globals up in the module called __name__, which would bring the original function back.
    scope.pop("__name__")
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__, copy.__module__, copy.__doc__ = forward.__kwdefaults__, forward.__module__, forward.__doc__
    return copy
