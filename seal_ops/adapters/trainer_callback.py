"""Scales and weak columns in the checkpoints of transformers' Trainer: saved, resumed, and the best brought back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..huggingface.wrappers import unwrapped
from .attachment import SUBMODULE, attached, load
from .files import COLUMNS, SUBFOLDER
from .gathering import is_main_process, is_sharded
from .saving import SaveLearned, folders_beside, is_learned
from .scales import Scales

_STATE_FILE = "trainer_state.json"


@dataclasses.dataclass
class Checkpoints:
    """What a run's checkpoints hold beside the scales; on the scales while the run lasts."""

    base_model: bool
    ignored_before: object = None


class SealCallback(TrainerCallback):
    """Makes a Trainer's checkpoints hold what is learned, resume from it, and ``load_best_model_at_end`` restore it.

    ``Trainer(model, args, callbacks=[seal_ops.SealCallback()])``, with scales or weak columns attached before.  Each
    checkpoint gets the folder ``seal_scales/<adapter>``, which `seal_ops.load(model, checkpoint)` finds, and the files
    of `WeakColumns.save_pretrained`, which `seal_ops.load_weak_columns(model, checkpoint)` finds; its weights file
    holds both too: that is where the Trainer looks when it resumes.  Under FSDP and DeepSpeed all processes gather the
    scales, and the first one writes.  With ``push_to_hub`` each upload holds them too.

    Args:
        save_base_model: False for checkpoints that hold the scales (and weak columns) and the optimiser's state but not
            the frozen base model, so kilobytes for a model of any size; a Trainer resumes from them,
            ``from_pretrained`` refuses them.
        resume_from: the checkpoint that ``Trainer.train(resume_from_checkpoint=...)`` is given, needed only where it
            lies outside ``output_dir`` and its weights file has no scales and no weak columns (PEFT's checkpoints, and
            those saved without this callback).

    Raises:
        ValueError: when the Trainer is made, neither scales nor weak columns on its model, or ``save_base_model=False``
            with scales on a part of it; when it trains, ``label_smoothing_factor`` with logits at labels alone.
    """

    def __init__(self, save_base_model: bool = True, resume_from: str | os.PathLike | None = None):
        self.save_base_model = save_base_model
        self.resume_from = None if resume_from is None else os.fspath(resume_from)
        self._saves: SaveLearned | None = None
        self._uploads = False  # whether scales lie in the folder that the Trainer uploads

    def on_init_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        scales = self._prepare(model)
        if scales is None:
            return
        scales.loaded, owner = False, scales.attachment.owner
        if not self.save_base_model and (whole := unwrapped(model, "SealCallback")) is not owner:
            raise ValueError(
                f"seal_ops.SealCallback: save_base_model=False must have the scales on the Trainer's model itself, got "
                f"scales on a part of it, {type(owner).__name__} in {type(whole).__name__}; attach to the whole model"
            )

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        _check_smoothing(args, kwargs.get("train_dataloader"))
        scales, columns = self._prepare(model), _columns_on(model)
        resumed = None
        if state.global_step > 0 and scales is not None and not scales.loaded:
            resumed = self._resumed(args, state)
            self._load(model, resumed)
        if state.global_step > 0 and columns is not None and _in_peft(model, columns.owner):
            # The Trainer has looked into PEFT's file alone.
            columns.restore(resumed or self._resumed(args, state))
        if scales is not None:
            scales.loaded = False

    def on_save(self, args, state, control, model: nn.Module | None = None, **kwargs):
        folder, columns = _checkpoint(args, state.global_step), _columns_on(model)
        scales, _ = _scales_on(model)
        # With save_on_each_node, more than one process writes. A hyperparameter search has its folders elsewhere; there
        # the model's save_pretrained has written them.
        writes = (args.should_save or is_main_process()) and os.path.isdir(folder)
        if scales is not None:
            scales.save_to(folders_beside(scales, folder), writes)
        if columns is not None and writes:
            columns.save_pretrained(folder)
        if not self.save_base_model and args.should_save:
            _tell_no_model(folder)

    def on_push_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        # The Trainer uploads a folder into which it copies of a checkpoint the files that it knows.
        if args.process_index != 0:
            return
        folder, output = _checkpoint(args, state.global_step), args.output_dir
        if not self.save_base_model and os.path.isdir(folder):
            _tell_no_model(folder)
        columns = _columns_on(model)
        scales = next((m for m in model.modules() if isinstance(m, Scales) and m.attachment is not None), None)
        if columns is not None:
            columns.save_pretrained(output)
        if scales is None:  # merged since: what lies there would be applied twice
            if self._uploads:
                shutil.rmtree(os.path.join(output, SUBFOLDER), ignore_errors=True)
        elif not any(is_sharded(scale) for _, scale in scales.items()):
            scales.save_to(folders_beside(scales, output), True)
        elif os.path.isdir(beside := os.path.join(folder, SUBFOLDER)):  # the other processes are not here
            shutil.copytree(beside, os.path.join(output, SUBFOLDER), dirs_exist_ok=True)
        self._uploads = scales is not None

    def on_train_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        columns = _columns_on(model)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if columns is not None and best is not None:
            columns.restore(best)
        if self._saves is not None:
            self._saves.remove()
            self._saves = None
        scales, attachment = _scales_on(model)
        if scales is None:
            return
        if best is not None:
            self._load(model, best)
        if scales.checkpoints is not None and not scales.checkpoints.base_model:
            attachment.owner._keys_to_ignore_on_save = scales.checkpoints.ignored_before
        scales.checkpoints = None

    def _prepare(self, model: nn.Module):
        """Marks the scales, so that the Trainer's checkpoints have them in the place where it looks for them.

        Returns them; None where weak columns are alone on the model.
        """
        scales, attachment = _scales_on(model)
        if scales is None:
            self._leave_base_out(_columns_on(model).owner)
        elif scales.checkpoints is None:
            owner = attachment.owner
            scales.checkpoints = Checkpoints(self.save_base_model, getattr(owner, "_keys_to_ignore_on_save", None))
            if not self.save_base_model:
                # transformers leaves these out of the file, and is silent where exactly they are missing in one.
                owner._keys_to_ignore_on_save = {n for n in owner.state_dict() if not is_learned(n)}
        return scales

    def _leave_base_out(self, owner: nn.Module) -> None:
        if self._saves is not None:
            return
        of_interrupted_run = owner.__dict__.get("save_pretrained")
        if isinstance(of_interrupted_run, SaveLearned):
            of_interrupted_run.remove()
        if not self.save_base_model:
            self._saves = SaveLearned(owner)
            self._saves.install()

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


def _check_smoothing(args, dataloader) -> None:
    """ValueError where the Trainer smooths labels that are further apart than the logits it gets."""
    collate = getattr(dataloader, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # out of the Trainer's, which takes away unused columns
    if args.label_smoothing_factor and getattr(collate, "label_positions_only", False) is not False:
        raise ValueError(
            f"seal_ops.SealCallback: label_smoothing_factor must be 0 with seal_ops.Collator(), which asks the model "
            f"for logits at labels alone, got {args.label_smoothing_factor}; use Collator(label_positions_only=False)"
        )


def _tell_no_model(folder: str) -> None:
    """Takes away from a checkpoint without the base what makes others take it for a whole model."""
    for name in ("config.json", "generation_config.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def _columns_on(model: nn.Module):
    """The `WeakColumns` on a model or on one inside it; None where there are none."""
    return next((m.__dict__[COLUMNS] for m in model.modules() if COLUMNS in m.__dict__), None)


def _scales_on(model: nn.Module):
    """The scales and their attachment; None twice where weak columns are alone on the model."""
    columns = _columns_on(model)
    if columns is not None and SUBMODULE not in columns.owner._modules:
        return None, None
    return attached(model, "SealCallback")


def _in_peft(model: nn.Module, owner: nn.Module) -> bool:
    return model is not owner and hasattr(model, "peft_config")


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
