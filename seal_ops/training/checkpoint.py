"""The checkpoint of a training run: one safetensors file with values, optimiser, random state and losses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..utils.files import replacing
from .random_state import get_random_state, gpus_of, set_random_state

NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a run has come, beside the values that it trains.

    Attributes:
        losses: of every optimiser step.
        seconds: of all steps.
        tile: tokens that MLPs and norms treat at once (None: all), which may move the last bits of a product; True
            while no run has decided it.
        linears: what the run has found out about its frozen linear layers in fp8.
        processes: how many wrote the checkpoint; None for no checkpoint, or one that does not say.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tile: int | None | bool = True
    linears: dict = field(default_factory=dict)
    processes: int | None = None


def save_checkpoint(
    path: str | os.PathLike,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: str,
    random: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """Replaces the checkpoint in one step; a process killed meanwhile leaves the one before.

    Args:
        trained: the trained parameters by name.
        optimizer: of them.
        progress: how far the run is; ``processes`` is told by ``random``.
        identity: of everything else that decides the outcome; :func:`load_checkpoint` compares it.
        random: the state of each process of the run, in their order; None for this one's alone.
    """
    from safetensors.torch import save_file

    random = [get_random_state(gpus_of(trained.values()))] if random is None else random
    tensors = {"losses": torch.tensor(progress.losses, dtype=torch.float64, device="cpu")}
    for rank, state in enumerate(random):
        tensors |= {f"{_random(rank)}{device}": value for device, value in state.items()}
    for name, parameter in trained.items():
        tensors[f"value.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    header = {
        "identity": identity,
        "seconds": str(progress.seconds),
        "tile": str(0 if progress.tile is True else progress.tile or 0),
        "processes": str(len(random)),
        "frozen_linears": json.dumps(progress.linears),
    }
    with replacing(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, header)


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
) -> Progress:
    """Puts values, optimiser and the random state of process ``rank`` back, and says how far the run was.

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
    state = {device: tensors.get(f"{mine}{device}") for device in ("cpu", *map(str, gpus_of(trained.values())))}
    set_random_state({device: value for device, value in state.items() if value is not None})
    return Progress(
        losses=tensors["losses"].tolist(),
        seconds=float(header["seconds"]),
        tile=int(header.get("tile", 0)) or None,
        linears=json.loads(header.get("frozen_linears", "{}")),
        processes=int(header["processes"]) if "processes" in header else None,
    )
