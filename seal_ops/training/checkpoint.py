"""The checkpoint of a training run: one safetensors file with values, optimiser, random state and losses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..utils.files import replacing

NAME = "checkpoint.safetensors"


def save_checkpoint(
    path: str | os.PathLike,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
    identity: str,
    tile: int | None = None,
    linears: dict | None = None,
    random: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """Replaces the checkpoint in one step; a process killed meanwhile leaves the one before.

    Args:
        trained: the trained parameters by name.
        identity: of everything else that decides the outcome; :func:`load_checkpoint` compares it.
        tile: tokens that MLPs and norms treat at once, which may move the last bits of a product.
        linears: what the run has found out about its frozen linear layers in fp8.
        random: :func:`random_state` of each process of the run, in their order; None for this one's alone.
    """
    from safetensors.torch import save_file

    random = [random_state(trained)] if random is None else random
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for rank, state in enumerate(random):
        tensors |= {f"{_random(rank)}{device}": value for device, value in state.items()}
    for name, parameter in trained.items():
        tensors[f"value.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    header = {"identity": identity, "seconds": str(seconds), "tile": str(tile or 0), "processes": str(len(random))}
    header["frozen_linears"] = json.dumps(linears or {})
    with replacing(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, header)


def random_state(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The random state of this process: device -> state, of the CPU and of the GPUs that hold ``trained``."""
    found = {"cpu": torch.get_rng_state()}
    return found | {str(device): torch.cuda.get_rng_state(device) for device in _gpus(trained)}


def _random(rank: int) -> str:
    """What the names of a process' random state begin with; that of the first as in a run of one process."""
    return f"rng.{rank}." if rank else "rng."


def steps_of(path: str | os.PathLike) -> int | None:
    """The steps that a checkpoint holds; None where there is no checkpoint that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("losses").get_shape()[0]
    except (OSError, SafetensorError):
        return None


def load_checkpoint(
    path: str | os.PathLike,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: str,
    rank: int = 0,
) -> tuple[list[float], float, int | None, dict, int | None]:
    """Puts values, optimiser and the random state of process ``rank`` back.

    Returns:
        ``(losses, seconds, tile, linears, processes)``; ``processes``: how many wrote it, None in an older file.

    Raises:
        ValueError: the file is damaged, or of a run with another ``identity``; nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"seal_ops.train: {path} must be a checkpoint, got {error}") from None
    if header.get("identity") != identity:
        raise ValueError(
            f"seal_ops.train: {path} must come from the same model, samples and settings to resume, got another run's"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"value.{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, field, owner = key.split(".", 2)
                # AdamW counts its steps on the CPU.
                state = optimizer.state[trained[owner]]
                state[field] = value if field == "step" else value.to(trained[owner].device)
    mine = _random(rank if f"{_random(rank)}cpu" in tensors else 0)  # the run may have had fewer processes
    torch.set_rng_state(tensors[f"{mine}cpu"])
    for device in _gpus(trained):
        if f"{mine}{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{mine}{device}"], device)
    linears = json.loads(header.get("frozen_linears", "{}"))
    processes = int(header["processes"]) if "processes" in header else None
    losses, tile = tensors["losses"].tolist(), int(header.get("tile", 0)) or None
    return losses, float(header["seconds"]), tile, linears, processes


def _gpus(trained) -> list[torch.device]:
    return sorted({p.device for p in trained.values() if p.device.type == "cuda"}, key=str)
