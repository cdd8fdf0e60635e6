"""The rotary embedding inside an attention module: recognised by what it computes, replaced by the fused one.

Only copies are changed.  A forward is copied with its rotary function replaced; its class and file stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types

import torch
from torch import Tensor

from ..ops.functional import rope

MAX_HEAD_DIM = 256  # of the ops


class Rotation:
    """cos and sin on their way through a module's forward, in the place of cos, while the rotation waits.

    q and k are kept as the rotary function got them, to see that the attention call gets the same.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = _halves(cos, sin)
        self.q = self.k = None


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, R/2] of transformers' [B, S, R], whose two halves are equal where pairs are (c, c + R/2)."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


# --------------------------------------------------------------------------------------------------------------------
# Recognising a rotary function
# --------------------------------------------------------------------------------------------------------------------
@functools.cache
def _is_half_split(function, device: str = "cpu") -> bool | None:
    """Whether ``function(q, k, cos, sin)`` is the half-split rotation, also where only the first R < D channels turn.

    None where it cannot be called so.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator, device="cpu").to(device) for heads in (2, 1))
    matches = []
    for rotary_dim in (8, 4):
        angle = torch.randn(1, 3, rotary_dim // 2, generator=generator, device="cpu").to(device)
        cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
        try:
            got = function(q.clone(), k.clone(), cos, sin, **_layout(function))
            expected = (_turned(t, cos, sin) for t in (q, k))
            matches.append(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True)))
        except Exception:  # another signature, or a function that cannot turn part of the channels
            matches.append(None)
    return None if matches[0] is None else matches[0] and matches[1] is not False


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-split rotation of x [B, H, S, D] by cos and sin [B, S, R]."""
    (c, s), size = (t[:, None] for t in _halves(cos, sin)), cos.shape[-1] // 2
    first, second, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


def _layout(function) -> dict:
    """The argument that says that heads come before tokens, where the function has one."""
    try:
        return {"unsqueeze_dim": 1} if "unsqueeze_dim" in inspect.signature(function).parameters else {}
    except (TypeError, ValueError):
        return {}


def _may_be_rotary(name: str, function) -> bool:
    """Whether it is worth trying: by its name, or by arguments called cos and sin."""
    if not callable(function) or isinstance(function, type):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    arguments = code.co_varnames[: code.co_argcount] if code else ()
    return "rotary" in name or {"cos", "sin"} <= set(arguments)


def _foreign(function, scope: dict) -> bool:
    """Whether another library put this function into the model's file."""
    return getattr(function, "__module__", "").split(".")[0] != scope.get("__name__", "").split(".")[0]


def _recognised(function, scope: dict) -> bool | None:
    """`_is_half_split`; another library's kernel is tried on the GPU where there is one."""
    return _is_half_split(function, "cuda" if _foreign(function, scope) and torch.cuda.is_available() else "cpu")


def rotary_functions(function, depth: int = 0) -> tuple:
    """What a forward would call for its rotary embedding now, its decorators included: the state a copy was made in."""
    if not isinstance(function, types.FunctionType) or depth > 8:
        return ()
    scope = function.__globals__
    found = tuple(scope[n] for n in sorted(_names(function.__code__)) if _may_be_rotary(n, scope.get(n)))
    for cell in function.__closure__ or ():
        try:
            found += rotary_functions(cell.cell_contents, depth + 1)
        except ValueError:  # empty
            pass
    return found


def _names(code: types.CodeType) -> set[str]:
    """The global names and attributes that a function's code uses, functions inside it included."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def names_used(function, depth: int = 0) -> set[str]:
    """The global names and attributes that a function uses, looked for through its decorators."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType) or depth > 8:
        return set()
    found = _names(function.__code__)
    for cell in function.__closure__ or ():
        try:
            found |= names_used(cell.cell_contents, depth + 1)
        except ValueError:  # empty
            pass
    return found


# --------------------------------------------------------------------------------------------------------------------
# Replacing it
# --------------------------------------------------------------------------------------------------------------------
def _replacement(original, backend: str | None):
    """Takes the place of a half-split ``original(q, k, cos, sin, unsqueeze_dim=1)``; q [B, Hq, S, D], k [B, Hkv, S,
    D]."""
    parameter = inspect.signature(original).parameters.get("unsqueeze_dim")
    default = 1 if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    def rotate(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, Rotation):  # waits for the attention call
            cos.q, cos.k = q, k
            return q, k
        heads_last = kwargs.get("unsqueeze_dim", default) == 2
        if q.shape[-1] > MAX_HEAD_DIM or cos.dim() != 3 or args:
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = _halves(cos, sin)
        if heads_last:
            return rope(q, k, cos, sin, backend=backend)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend=backend)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def _copied(function: types.FunctionType, scope: dict, closure) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__module__, copy.__doc__ = function.__kwdefaults__, function.__module__, function.__doc__
    return copy


def _with_replacement(function, backend: str | None, depth: int = 0) -> types.FunctionType | None:
    """A copy of ``function`` in which half-split rotary functions are replaced, looked for through its decorators.

    A decorator is a function that holds the decorated one in a closure; it is copied, too, so it goes on working.
    None where there is nothing to replace.
    """
    if not isinstance(function, types.FunctionType) or depth > 8:
        return None
    scope = function.__globals__
    found = {name: scope[name] for name in sorted(_names(function.__code__)) if _may_be_rotary(name, scope.get(name))}
    found = {name: f for name, f in found.items() if _recognised(f, scope)}
    cells = list(function.__closure__ or ())
    inner = [_inner(name, cell, backend, depth) for name, cell in zip(function.__code__.co_freevars, cells)]
    if not found and not any(inner):
        return None
    if found:
        scope = {**scope, **{name: _replacement(f, backend) for name, f in found.items()}}
        # torch.compile looks globals up in the module called __name__, which would bring the original function back.
        scope.pop("__name__")
    closure = tuple(types.CellType(new) if new else cell for new, cell in zip(inner, cells))
    copy = _copied(function, scope, closure or None)
    copy.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return copy


def _inner(name: str, cell: types.CellType, backend: str | None, depth: int):
    """What takes the place of a closure's content; None where it stays."""
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return None
    if _may_be_rotary(name, content) and _is_half_split(content):
        return _replacement(content, backend)
    return _with_replacement(content, backend, depth + 1)


def with_fused_rotation(forward, backend: str | None = None) -> types.FunctionType | None:
    """An attention class's ``forward`` with its rotary function replaced, or None where it calls none."""
    return _with_replacement(forward, backend)


def unreplaced(cls: type) -> str | None:
    """Why a rotary function in the source of an attention class was not replaced; None where there is none.

    A function is spoken of where it is the half-split rotation, or where another library put it there and it cannot
    be tried (Liger's kernels on a CPU).  Other rotations are left alone.
    """
    try:
        source = inspect.getsource(cls)
        words = set(re.findall(r"\w+", source[source.index("class ") :]))  # a decorator of the class may name it unused
    except (OSError, TypeError, ValueError):
        words = set()
    scope = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    for name in sorted(words | names_used(cls.forward)):
        function = scope.get(name, inspect.getattr_static(cls, name, None))
        function = getattr(function, "__func__", function)
        if not _may_be_rotary(name, function):
            continue
        verdict = _recognised(function, scope)
        if verdict:
            return f"its forward hides the rotary function {name}"
        if verdict is None and _foreign(function, scope):
            return f"its rotary function {name} is {function.__module__}'s, which seal_ops does not know"
    return None
