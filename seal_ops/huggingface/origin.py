"""What result files say of where they come from; information for people, which no run compares."""

import functools

import torch
from torch import nn

from ..ops.environment import facts
from .identity import describe_model


def provenance(model: nn.Module) -> dict:
    """``model`` (see :func:`describe_model`), ``versions`` of all that computes, ``threads`` of the CPU."""
    return {"model": describe_model(model), "versions": dict(_versions()), "threads": torch.get_num_threads()}


@functools.cache
def _versions():
    return facts()
