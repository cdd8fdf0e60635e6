"""A linear layer with weak columns: what its forward adds, and the class that its module has while they are attached.

``y = base(x) + x[..., index] @ delta.T`` with the base frozen.  The module's class is exchanged for a subclass, made
once for each class, that has ``column_delta`` and ``column_index`` beside what the base has: names, hooks and the
base's own tensors stay as they are.

Method: QEFT (arXiv 2410.08661) and its parent OWQ (arXiv 2306.02272), which replace the columns; adding the difference
is the same product, and needs neither a reordering nor a kernel of its own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..adapters.files import DELTA, INDEX
from ..adapters.freezing import warn_if_frozen
from ..huggingface.patch import rebind
from . import bases
from .product import with_columns, written_out_with_columns


class _Columns:
    """What a layer has beside its base: mixed into the subclass that its module gets."""

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` reaches here too; the optimiser's copy keeps its precision.
        before = self.column_delta.detach()
        super()._apply(fn, recurse)
        if self.column_delta.dtype != before.dtype and not self.column_delta.is_meta:
            self.column_delta.data = before.to(self.column_delta.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weak_columns={self.column_index.numel()}"


def _learns(module, x: Tensor) -> bool:
    """Whether gradients flow through a base that is frozen as a whole and can be written out."""
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or module.column_delta.requires_grad)
        and not torch.compiler.is_compiling()
        and not any(p.requires_grad for name, p in module._parameters.items() if p is not None and name != DELTA)
        and bases.is_readable(module)
    )


@functools.cache
def _columns_class(cls: type, original) -> type:
    @functools.wraps(original)
    def forward(self, x, *args, **kwargs):
        # Without the attribute: taken off, and called by a hook that another library had put round this function.
        if not self.__dict__.get("columns_on", False):
            return original(self, x, *args, **kwargs)
        warn_if_frozen(self, self.column_delta, self.columns_may_be_frozen, "weak columns", "columns")
        if self.columns_own and not (args or kwargs) and _learns(self, x):
            weight_of = functools.partial(bases.weight_of, self, x.dtype)
            return written_out_with_columns(weight_of, x, self.column_index, self.column_delta, self.bias)
        base = lambda value: original(self, value, *args, **kwargs)
        return with_columns(base, x, self.column_index, self.column_delta, self.columns_own)

    def __reduce_ex__(self, protocol):
        return (_rebuilt, (cls,), *super(made, self).__reduce_ex__(protocol)[2:])

    made = type(
        f"WeakColumns{cls.__name__}",
        (_Columns, cls),
        {
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "__module__": cls.__module__,
            "__qualname__": f"WeakColumns{cls.__qualname__}",
            "__doc__": cls.__doc__,
            "_columns_base": cls,
        },
    )
    return made


def _rebuilt(cls: type) -> nn.Module:
    """An empty module of the exchanged class: what unpickling and copying start from."""
    made = _columns_class(cls, cls.forward)
    return made.__new__(made)


def put_on(module: nn.Module, index: Tensor, delta: Tensor) -> None:
    """Gives ``module`` weak columns, ``index`` int64 [k], sorted, ``delta`` [out, k]."""
    base = type(module)
    module.register_buffer(INDEX, index)
    module.register_parameter(DELTA, nn.Parameter(delta))
    if bases.is_gptq(module):
        setattr(module, bases.UNPACKS, bases.unpacks(module))
    module.columns_own, module.columns_on, module.columns_may_be_frozen = bases.writes_anew(module), True, False
    module.__class__ = _columns_class(base, base.forward)
    rebind(module, base.forward)


def take_off(module: nn.Module) -> None:
    """The reverse of :func:`put_on`."""
    made = type(module)
    if "_columns_base" in made.__dict__:  # else another library's subclass is on top; ours calls the original now
        module.__class__ = made._columns_base
        rebind(module, made.forward)
    for name in (DELTA, INDEX, "columns_own", "columns_on", "columns_may_be_frozen"):
        delattr(module, name)
    module.__dict__.pop(bases.UNPACKS, None)


def has_columns(module: nn.Module) -> bool:
    """Whether a module has weak columns now."""
    return DELTA in module._parameters
