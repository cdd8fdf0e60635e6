"""The random state of a process: of its CPU, and of the GPUs that hold what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def gpus_of(trained: Iterable[nn.Parameter]) -> list[torch.device]:
    """The GPUs that hold the parameters, each once."""
    return sorted({p.device for p in trained if p.device.type == "cuda"}, key=str)


def get_random_state(gpus: Iterable[torch.device]) -> dict[str, Tensor]:
    """The state now: device -> state, of the CPU and of ``gpus``."""
    return {"cpu": torch.get_rng_state()} | {str(device): torch.cuda.get_rng_state(device) for device in gpus}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`get_random_state` gave."""
    for device, value in state.items():
        if device == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)
