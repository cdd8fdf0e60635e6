"""Tensor parallelism of transformers (``tp_plan``): each process holds a share of the rows of q, k and v, so of the
heads, and a share of the columns of the output projection."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def group_of(model: nn.Module):
    """The processes among which transformers has divided ``model``, or None."""
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
    if mesh is None or not size or size == 1:
        return None
    return mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()


def count_all_heads(layer, group) -> None:
    """Makes ``num_heads`` and ``num_kv_heads`` of an observed layer (`AttentionLayer`) count those of all processes.

    What the output projection reads tells whether heads are divided.  Raises ValueError where it does not.
    """
    size = dist.get_world_size(group)
    width = getattr(layer.output_projection, "in_features", None)
    here = layer.num_heads * layer.head_dim
    if width == here:
        return
    if width != here * size:
        raise ValueError(
            f"seal_ops.attach: a tensor-parallel model must read {here} channels of attention in its output "
            f"projection, or those of {size} processes, got {type(layer.module).__name__} with {width}"
        )
    layer.num_heads, layer.num_kv_heads, layer.tensor_group = layer.num_heads * size, layer.num_kv_heads * size, group
