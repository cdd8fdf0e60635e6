"""A linear layer with weak columns: what its forward adds, and the class that its module has while they are attached.

``y = base(x) + x[..., index] @ delta.T`` with the base frozen.  The module's class is exchanged for a subclass, made
once for each class, that has ``column_delta`` and ``column_index`` beside what the base has: names, hooks and the
base's own tensors stay as they are.

Method: QEFT (arXiv 2410.08661) and its parent OWQ (arXiv 2306.02272), which replace the columns; adding the difference
is the same product, and needs neither a reordering nor a kernel of its own.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from ..huggingface.patch import rebind

DELTA, INDEX = "column_delta", "column_index"


class _Pick(torch.autograd.Function):
    """``x`` and ``x[..., index]``.  The backward pass adds the picked columns' gradient into the one that the base has
    made, so that no gradient as large as ``x`` is written for k columns."""

    @staticmethod
    def forward(ctx, x, index, owned):
        ctx.save_for_backward(index)
        ctx.owned = owned
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.index_select(-1, index)

    @staticmethod
    def backward(ctx, grad, grad_picked):
        (index,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        if grad is None or grad_picked is None:
            raise RuntimeError(
                "seal_ops: a linear layer with weak columns must have a base that passes gradients to its input, "
                "got one that gave none in this backward pass"
            )
        # `owned`: the gradient is the base's own product, which nothing else reads.
        if ctx.owned and not torch.is_grad_enabled():
            return grad.index_add_(-1, index, grad_picked.to(grad.dtype)), None, None
        return grad.index_add(-1, index, grad_picked.to(grad.dtype)), None, None


class _AddProduct(torch.autograd.Function):
    """``y + picked @ delta.T`` in the dtype of ``y``.  Kept for the backward pass: ``picked`` and ``delta``."""

    @staticmethod
    def forward(ctx, y, picked, delta, owned):
        ctx.save_for_backward(picked, delta)
        rows, weight = picked.reshape(-1, picked.shape[-1]).to(y.dtype), delta.to(y.dtype).t()
        flat = y.reshape(-1, y.shape[-1])
        if owned and y.is_contiguous():
            flat.addmm_(rows, weight)
            ctx.mark_dirty(y)
            return y
        return torch.addmm(flat, rows, weight).view(y.shape)

    @staticmethod
    def backward(ctx, grad):
        picked, delta = ctx.saved_tensors
        need_y, need_picked, need_delta, _ = ctx.needs_input_grad
        grad_picked = grad_delta = None
        if need_picked:
            grad_picked = (grad @ delta.to(grad.dtype)).to(picked.dtype)
        if need_delta:
            rows, flat = picked.reshape(-1, picked.shape[-1]), grad.reshape(-1, grad.shape[-1])
            grad_delta = (flat.t() @ rows.to(grad.dtype)).to(delta.dtype)
        return grad if need_y else None, grad_picked, grad_delta, None


def with_columns(y_of, x: Tensor, index: Tensor, delta: Tensor, owned: bool = False) -> Tensor:
    """``y_of(x) + x[..., index] @ delta.T``: x [..., in], index int64 [k], delta [out, k]; the sum in the dtype of y.

    ``owned``: what ``y_of`` returns, forward and as the gradient of its input, is a new tensor that nothing else
    reads, so it may be written.
    """
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        x, picked = _Pick.apply(x, index, owned)
        return _AddProduct.apply(y_of(x), picked, delta, owned)
    y, picked = y_of(x), x.index_select(-1, index)
    return torch.addmm(
        y.reshape(-1, y.shape[-1]), picked.reshape(-1, index.numel()).to(y.dtype), delta.to(y.dtype).t()
    ).view(y.shape)


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


def _warn_frozen(module) -> None:
    if (
        module.training
        and not module.column_delta.requires_grad
        and not module.columns_may_be_frozen
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        warnings.warn(
            "seal_ops: the model is trained while its weak columns are frozen; peft.get_peft_model freezes all that "
            "is not its own. Call columns.requires_grad_(True) to train them too, or columns.requires_grad_(False) to "
            "say that they are to stay",
            stacklevel=3,
        )


@functools.cache
def _columns_class(cls: type, original) -> type:
    @functools.wraps(original)
    def forward(self, x, *args, **kwargs):
        # Without the attribute: taken off, and called by a hook that another library had put round this function.
        if not self.__dict__.get("columns_on", False):
            return original(self, x, *args, **kwargs)
        _warn_frozen(self)
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


def put_on(module: nn.Module, index: Tensor, delta: Tensor, owned: bool) -> None:
    """Gives ``module`` weak columns; ``owned`` as in :func:`with_columns`."""
    base = type(module)
    module.register_buffer(INDEX, index)
    module.register_parameter(DELTA, nn.Parameter(delta))
    module.columns_own, module.columns_on, module.columns_may_be_frozen = owned, True, False
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


def has_columns(module: nn.Module) -> bool:
    """Whether a module has weak columns now."""
    return DELTA in module._parameters
