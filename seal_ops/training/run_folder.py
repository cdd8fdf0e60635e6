"""The folder of a training run: what it saves there, and how it resumes from that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..adapters.saving import folders_beside, save_trained
from ..huggingface.identity import fingerprint
from ..utils.files import atomic_write, check_folder
from . import groups
from .checkpoint import NAME as CHECKPOINT
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .processes import Processes
from .random_state import get_random_state, gpus_of

RESULT = "training.json"


class RunFolder:
    """The folder of one run.  All processes call every method, and the first one writes.

    Args:
        folder: it is created.
        model: that is trained.
        trained: the parameters that are trained, by name.
        optimizer: of these parameters.
        processes: of the run.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
    ):
        self.folder = check_folder(folder, "seal_ops.train", "output_dir")
        self.checkpoint = os.path.join(folder, CHECKPOINT)
        self.model, self.trained, self.optimizer, self.processes = model, trained, optimizer, processes
        self._identity: str | None = None

    def begin(self, resume: bool, settings: Mapping, samples: Sequence) -> Progress:
        """Takes the state over from the checkpoint where there is one to ``resume``; else removes an earlier run's.

        Raises:
            ValueError: the checkpoint is damaged, or of another run.
        """
        self._identity = _identity(self.model, self.trained, settings, samples)
        if self.processes.agree(resume and os.path.exists(self.checkpoint)):
            return self._resumed()
        # Nothing in the folder may pass for this run's.
        for name in (RESULT, CHECKPOINT) if self.processes.main else ():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, name))
        return Progress()

    def _resumed(self) -> Progress:
        processes = self.processes
        found = load_checkpoint(self.checkpoint, self.trained, self.optimizer, self._identity, processes.rank)
        if found.processes not in (None, processes.count) and processes.main:
            wrote = f"{found.processes} process{'es' if found.processes > 1 else ''}"
            warnings.warn(
                f"seal_ops.train: {self.checkpoint} was written by {wrote} and goes on with {processes.count}: "
                f"gradients are summed in another order, so the last bits may differ, and dropout draws other numbers",
                stacklevel=4,
            )
        return found

    def save_checkpoint(self, progress: Progress) -> None:
        """Replaces the checkpoint."""
        random = self.processes.all(get_random_state(gpus_of(self.trained.values())))
        if self.processes.main:
            save_checkpoint(self.checkpoint, self.trained, self.optimizer, progress, self._identity, random)

    def save_result(self, result: dict) -> None:
        """Writes what was trained, and ``result`` as `training.json`."""
        scales = getattr(self.model, "seal_scales", None)
        if scales is not None:
            scales.card.trained(result["settings"])
        if self.processes.main:
            _save_trained(self.model, scales, self.folder)
            atomic_write(os.path.join(self.folder, RESULT), json.dumps(result, indent=1) + "\n")
        self.processes.wait()


def _identity(model, trained, settings, samples) -> str:
    """Hash of everything that decides the outcome apart from the trained values."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(fingerprint(model, trainable=False).encode())
    for name, parameter in trained.items():
        digest.update(f"{name}{list(parameter.shape)}".encode())
    for sample in samples:
        digest.update(json.dumps([sample.input_ids, sample.labels]).encode())
    return digest.hexdigest()


def _save_trained(model, scales, folder):
    """Weak columns lie in the folder itself, and scales trained with them in a folder of it."""
    columns = getattr(model, "seal_weak_columns", None)
    if columns is not None:
        columns.save_pretrained(folder)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not groups.is_column(name)]
    if columns is None or not all("seal_scales." in name for name in trained):
        save_trained(model, scales, folder)
    elif scales is not None:
        scales.save_to(folders_beside(scales, folder))
