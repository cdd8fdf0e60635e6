"""The share of a layer's query heads with which this process attends."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from . import ulysses


@dataclasses.dataclass(frozen=True)
class HeadShare:
    """Heads ``rank * heads`` to ``(rank + 1) * heads - 1`` of a layer.

    ``group``: of the processes whose gradients are to be summed here (tensor parallelism).  None where whoever averages
    the gradients of all parameters does it (sequence parallelism: DeepSpeed, DDP).
    """

    rank: int
    heads: int
    group: object | None = None

    def of(self, tensor: Tensor | None, dim: int) -> Tensor | None:
        """The entries of these heads of a tensor with one for every head along ``dim``; None stays."""
        if tensor is None or tensor.shape[dim] == self.heads:
            return tensor
        if self.group is not None:
            tensor = _SumOfGradients.apply(tensor, self.group)
        return tensor.narrow(dim, self.rank * self.heads, self.heads)

    def of_scale(self, scale: Tensor | None) -> Tensor | None:
        """The same of a scale [Hq], [Hq, D] or [B, Hq, 1 or D]."""
        return self.of(scale, 1 if scale is not None and scale.dim() == 3 else 0)


class _SumOfGradients(torch.autograd.Function):
    """A tensor as it is; its gradient summed over the processes of a group, each of which uses a part of it."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def share_of(layer, heads: int) -> HeadShare | None:
    """The share of a layer (`AttentionLayer`) whose attention is called with ``heads`` heads; None for all of them.

    Raises:
        RuntimeError: fewer heads than the layer has, for no known reason.
    """
    if heads == layer.num_heads:
        return None
    if layer.tensor_group is not None and heads * dist.get_world_size(layer.tensor_group) == layer.num_heads:
        return HeadShare(dist.get_rank(layer.tensor_group), heads, layer.tensor_group)
    place = ulysses.place()
    if place is not None and heads * place[1] == layer.num_heads:
        return HeadShare(place[0], heads)
    raise RuntimeError(
        f"seal_ops: {type(layer.module).__name__} must attend with the {layer.num_heads} heads that it had when scales "
        f"were attached, got {heads}"
    )
