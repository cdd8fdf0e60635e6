"""The scales in the checkpoints of transformers' Trainer: saved, resumed, and the best ones brought back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .attachment import attached, load
from .files import DELTA, INDEX, SUBFOLDER
from .gathering import is_main_process
from .saving import folders_beside

_STATE_FILE = "trainer_state.json"


@dataclasses.dataclass
class Checkpoints:
    """What a run's checkpoints hold beside the scales; on the scales while the run lasts."""

    base_model: bool
    ignored_before: object = None


class SealCallback(TrainerCallback):
    """Makes a Trainer's checkpoints hold the scales, resume from them, and ``load_best_model_at_end`` restore them.

    ``Trainer(model, args, callbacks=[seal_ops.SealCallback()])``, with scales attached before.  Each checkpoint gets
    the folder ``seal_scales/<adapter>``, which `seal_ops.load(model, checkpoint)` finds, and its weights file holds the
    scales too: that is where the Trainer looks when it resumes.  Under FSDP and DeepSpeed all processes gather, and the
    first one writes.

    Args:
        save_base_model: False for checkpoints that hold the scales (and weak columns) and the optimiser's state but not
            the frozen base model, so kilobytes for a model of any size; a Trainer resumes from them,
            ``from_pretrained`` refuses them.
        resume_from: the checkpoint that ``Trainer.train(resume_from_checkpoint=...)`` is given, needed only where it
            lies outside ``output_dir`` and its weights file has no scales (PEFT's checkpoints, and those saved without
            this callback).

    Raises:
        ValueError: no scales on the Trainer's model, when its training begins.
    """

    def __init__(self, save_base_model: bool = True, resume_from: str | os.PathLike | None = None):
        self.save_base_model = save_base_model
        self.resume_from = None if resume_from is None else os.fspath(resume_from)

    def on_init_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        scales, _ = self._prepare(model)
        scales.loaded = False

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        scales, _ = self._prepare(model)
        if state.global_step > 0 and not scales.loaded:
            self._load(model, self._resumed(args, state))
        scales.loaded = False

    def on_save(self, args, state, control, model: nn.Module | None = None, **kwargs):
        scales, _ = attached(model, "SealCallback")
        folder = _checkpoint(args, state.global_step)
        # With save_on_each_node, more than one process writes. A hyperparameter search has its folders elsewhere; there
        # the model's save_pretrained has written them.
        writes = (args.should_save or is_main_process()) and os.path.isdir(folder)
        scales.save_to(folders_beside(scales, folder), writes)
        if not self.save_base_model and args.should_save:
            # Without them nobody takes the checkpoint for a whole model; the Trainer does not need them.
            for name in ("config.json", "generation_config.json"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))

    def on_train_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        scales, attachment = attached(model, "SealCallback")
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(model, state.best_model_checkpoint)
        if scales.checkpoints is not None and not scales.checkpoints.base_model:
            attachment.owner._keys_to_ignore_on_save = scales.checkpoints.ignored_before
        scales.checkpoints = None

    def _prepare(self, model: nn.Module):
        """Marks the scales, so that the Trainer's checkpoints have them in the place where it looks for them."""
        scales, attachment = attached(model, "SealCallback")
        if scales.checkpoints is None:
            owner = attachment.owner
            scales.checkpoints = Checkpoints(self.save_base_model, getattr(owner, "_keys_to_ignore_on_save", None))
            if not self.save_base_model:
                # transformers leaves these out of the file, and is silent where exactly they are missing in one.
                owner._keys_to_ignore_on_save = {n for n in owner.state_dict() if not _is_learned(n)}
        return scales, attachment

    @staticmethod
    def _load(model: nn.Module, folder: str) -> None:
        scales, attachment = attached(model, "SealCallback")
        path = os.path.join(folder, SUBFOLDER, scales.active_adapter)
        if not os.path.isdir(path):
            raise ValueError(
                f"seal_ops.SealCallback: the checkpoint must hold {SUBFOLDER}/{scales.active_adapter}, "
                f"got {folder!r} without it: it was saved without seal_ops.SealCallback"
            )
        if any(hasattr(scale, "full_tensor") for _, scale in scales.items()):
            return  # sharded: FSDP's own checkpoint has brought them
        load(attachment.owner, path)

    def _resumed(self, args, state) -> str:
        """The checkpoint that the Trainer resumed from, which it does not tell its callbacks."""
        given = args.resume_from_checkpoint
        for folder in (
            self.resume_from,
            given if isinstance(given, str) else None,
            _checkpoint(args, state.global_step),
        ):
            if folder is not None and (folder == self.resume_from or _is_of(folder, state)):
                return folder
        raise ValueError(
            f"seal_ops.SealCallback: resume_from must name the checkpoint that the Trainer resumes from, "
            f"got None, and {_checkpoint(args, state.global_step)!r} is not it"
        )


def _is_learned(name: str) -> bool:
    """Whether a name in a state dict is that of scales or of weak columns."""
    return name.startswith("seal_scales.") or name.rpartition(".")[2] in (DELTA, INDEX)


def _checkpoint(args, step: int) -> str:
    return os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _is_of(folder: str, state) -> bool:
    """Whether a checkpoint is the one that ``state`` was read from: it tells the same history."""
    try:
        with open(os.path.join(folder, _STATE_FILE), encoding="utf-8") as file:
            saved = json.load(file)
    except (OSError, ValueError):
        return False
    return saved.get("global_step") == state.global_step and saved.get("log_history") == state.log_history
