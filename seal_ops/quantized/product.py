"""The product of a linear layer with weak columns, ``base(x) + x[..., index] @ delta.T``, and its gradients.

Two ways that give the same: round any base that autograd can differentiate, and for bases whose weight can be written
out, with that weight made for one product at a time.  Both keep ``x[..., index]`` for the backward pass and nothing
else of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Pick(torch.autograd.Function):
    """``x`` and ``x[..., index]``.  The backward pass adds the picked columns' gradient into the one that the base has
    made, so that no gradient as large as ``x`` is written for k columns."""

    @staticmethod
    def forward(ctx, x, index, owned):
        ctx.save_for_backward(index)
        ctx.owned, ctx.shape = owned, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.index_select(-1, index)

    @staticmethod
    def backward(ctx, grad, grad_picked):
        (index,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0] or grad_picked is None:
            return grad, None, None
        if grad is None:  # a second-order gradient that does not pass through the base
            return grad_picked.new_zeros(ctx.shape).index_add(-1, index, grad_picked), None, None
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
        if owned and y.is_contiguous() and not y._is_view():
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
    rows, weight = picked.reshape(-1, index.numel()).to(y.dtype), delta.to(y.dtype).t()
    if owned and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(rows, weight)
        return y
    return torch.addmm(y.reshape(-1, y.shape[-1]), rows, weight).view(y.shape)


class _WrittenOut(torch.autograd.Function):
    """The whole layer, where its weight can be written out: three products into tensors that are written once."""

    @staticmethod
    def forward(ctx, x, index, delta, bias, weight_of):
        weight = weight_of()
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        picked = rows.index_select(1, index)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(weight.dtype))
        y.addmm_(picked, delta.to(weight.dtype).t())
        ctx.save_for_backward(picked, delta, index)
        ctx.weight_of, ctx.shape, ctx.dtype = weight_of, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        picked, delta, index = ctx.saved_tensors
        grad_x = grad_delta = None
        grad = grad.reshape(-1, grad.shape[-1]).to(picked.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight_of()
            grad_x.index_add_(1, index, grad @ delta.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_delta = (grad.t() @ picked).to(delta.dtype)
        return grad_x, None, grad_delta, None, None


def written_out_with_columns(
    weight_of: Callable[[], Tensor], x: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """``x @ weight_of().T + bias + x[..., index] @ delta.T``, computed in the weight's dtype, given in that of ``x``.

    ``weight_of`` writes the frozen weight [out, in] out: once in the forward pass, and once more in the backward.
    """
    return _WrittenOut.apply(x, index, delta, bias, weight_of)
