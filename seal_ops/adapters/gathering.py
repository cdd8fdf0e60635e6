"""Whole tensors from sharded ones, and which process writes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def is_main_process() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def is_sharded(parameter: Tensor) -> bool:
    """Whether other processes hold parts of a parameter: FSDP2's DTensors and DeepSpeed's partitions."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


@torch.no_grad()
def whole(holders: Mapping[int, nn.Module]) -> dict[int, Tensor]:
    """Copies on the CPU of the scales of ``holders`` (`LayerScale`).

    Offloaded ones are brought by their modules' hooks, FSDP2's DTensors and DeepSpeed's partitions are gathered; all
    processes of such a run must call this.
    """
    partitioned = [p for h in holders.values() for p in h.parameters() if hasattr(p, "ds_id")]
    if partitioned:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(partitioned)
    else:
        gathered = contextlib.nullcontext()
    found = {}
    with gathered:
        for key, holder in holders.items():
            tensor = holder(learned=True)
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()
            found[key] = tensor.detach().to("cpu", copy=True)
    return found


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the form in which it can be copied into ``parameter``: sharded where that is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
