"""``save_pretrained`` of a model with scales: plain weights, and the scales beside them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.files import replacing_files
from ..utils.frames import callers
from .files import DELTA, INDEX, SUBFOLDER

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+$")
_SCALE = re.compile(r"(?:^|\.)seal_scales\.layers\.(\d+)\.scale$")


def save_trained(model: nn.Module, scales: nn.Module | None, folder: str | os.PathLike) -> None:
    """Writes what a run has trained: the scales, or, where other parameters were trained too, the model and the scales.

    `seal_ops.load` finds the scales in ``folder`` either way.
    """
    if scales is None:
        with replacing_files(folder) as temporary:  # PEFT and transformers write in place
            model.save_pretrained(temporary)
    elif all(_SCALE.search(name) for name, p in model.named_parameters() if p.requires_grad):
        scales.save_pretrained(folder)
    else:
        scales.saved_beside = True
        try:
            with replacing_files(folder) as temporary:  # PEFT and transformers write in place
                model.save_pretrained(temporary)
        finally:
            scales.saved_beside = False
        scales.save_to(folders_beside(scales, folder))


def folders_beside(scales: nn.Module, folder: str | os.PathLike) -> dict[str, str]:
    """Adapter -> its folder in that of a whole model."""
    return {name: os.path.join(os.fspath(folder), SUBFOLDER, name) for name in scales.adapter_names}


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is called as a Trainer calls its checkpoints."""
    return _CHECKPOINT.match(os.path.basename(os.path.normpath(os.fspath(folder)))) is not None


def save_around(owner: nn.Module) -> tuple[str, bool] | None:
    """The folder, and whether this process writes, of a ``save_pretrained`` that is under way of a transformers model
    around ``owner``; None where there is none.

    Scales that were attached to a part of a model are unknown to the whole, which would write them among its weights,
    where neither ``from_pretrained`` nor `seal_ops.load` finds them.
    """
    for frame in callers():
        if frame.f_code.co_name == "save_pretrained":
            given = frame.f_locals
            model = given.get("self")
            if isinstance(model, PreTrainedModel) and model is not owner and "save_directory" in given:
                return os.fspath(given["save_directory"]), given.get("is_main_process", True)
    return None


class SaveBoth:
    """Stands in for ``save_pretrained`` of one model while its scales are attached; copied and pickled with it.

    The weights are saved as without scales, and every adapter in the folder ``seal_scales/<its name>``, where
    `seal_ops.load` finds it.  While a Trainer saves with `SealCallback`, the model's file holds the scales as well:
    that is where a Trainer looks when it resumes.
    """

    def __init__(self, model: nn.Module, scales: nn.Module):
        self.model, self.scales = model, scales

    def __deepcopy__(self, memo: dict) -> SaveBoth:
        copied = memo[id(self)] = SaveBoth(copy.deepcopy(self.model, memo), copy.deepcopy(self.scales, memo))
        if "attachment" in copied.scales.__dict__ and copied.scales.attachment is None:
            # They were copied before the model that they are on.
            copied.scales.attachment = copy.deepcopy(self.scales.attachment, memo)
        return copied

    def install(self) -> None:
        self.model.__dict__["save_pretrained"] = self

    def remove(self) -> None:
        if self.model.__dict__.get("save_pretrained") is self:
            del self.model.__dict__["save_pretrained"]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, *args, **kwargs):
        given = self.__signature__.bind(*args, **kwargs).arguments
        if given.get("push_to_hub"):
            return self._save_and_push(given)
        folder, values = os.fspath(given["save_directory"]), self._gathered(given.get("state_dict"))
        self.scales.saved_beside = True
        try:
            with self._without_scales(folder):
                result = type(self.model).save_pretrained(self.model, *args, **kwargs)
        finally:
            self.scales.saved_beside = False
        if not os.path.isfile(folder):  # which transformers refuses by logging an error
            self.scales.save_to(folders_beside(self.scales, folder), given.get("is_main_process"), values)
        return result

    def _save_and_push(self, given: dict):
        """The folder first, then the repository; transformers' own way would upload before the scales are there."""
        options = {**given, **given.get("kwargs", {})}
        options.pop("kwargs", None)
        push = type(self.model).push_to_hub
        hub = {
            n: options.pop(n)
            for n in list(options)
            if n in inspect.signature(push).parameters and n not in ("self", "max_shard_size", "token")
        }
        repo_id = hub.pop("repo_id", None) or os.path.basename(os.path.normpath(os.fspath(given["save_directory"])))
        options.pop("push_to_hub")
        self(**options)
        if options.get("is_main_process", True):
            push(self.model, repo_id, token=options.get("token"), **hub)

    def _gathered(self, state_dict) -> dict | None:
        """The scales in a state dict that a sharded run has gathered; None where the modules themselves hold them."""
        found = {}
        for name, tensor in (state_dict or {}).items():
            match = _SCALE.search(name)
            if match and not hasattr(tensor, "full_tensor"):
                found[int(match[1])] = tensor.detach().to("cpu", torch.float32, copy=True)
        return found if set(found) == set(self.scales.config.layers) else None

    @contextlib.contextmanager
    def _without_scales(self, folder: str):
        """Inside the block transformers leaves the scales out of the weights, or, if a checkpoint asks so, all else."""
        model, mode = self.model, self.scales.checkpoints
        # A run that was interrupted never said that it is over: only what is called a checkpoint is one.
        if mode is not None and is_checkpoint(folder):
            yield
            return
        names = (name for name, _ in model.named_parameters() if _SCALE.search(name))
        before = getattr(model, "_keys_to_ignore_on_save", None) if mode is None else mode.ignored_before
        with _left_out(model, {*(before or ()), *names}):
            yield


class SaveLearned:
    """Stands in for ``save_pretrained`` of a model with weak columns alone, whose checkpoints hold nothing else.

    What is not called a checkpoint is saved whole, also after a run that was interrupted and never said that it is
    over.
    """

    def __init__(self, model: nn.Module):
        self.model, self.ignored_before = model, getattr(model, "_keys_to_ignore_on_save", None)

    def install(self) -> None:
        # transformers leaves these out of the file, and is silent where exactly they are missing in one.
        self.model._keys_to_ignore_on_save = {n for n in self.model.state_dict() if not is_learned(n)}
        self.model.__dict__["save_pretrained"] = self

    def remove(self) -> None:
        if self.model.__dict__.get("save_pretrained") is self:
            del self.model.__dict__["save_pretrained"]
            self.model._keys_to_ignore_on_save = self.ignored_before

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, save_directory, *args, **kwargs):
        whole = contextlib.nullcontext()
        if not is_checkpoint(save_directory):
            whole = _left_out(self.model, self.ignored_before)
        with whole:
            return type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)


@contextlib.contextmanager
def _left_out(model: nn.Module, names: set[str] | None):
    """Inside the block transformers leaves tensors of these names out of what it saves."""
    present, before = "_keys_to_ignore_on_save" in model.__dict__, getattr(model, "_keys_to_ignore_on_save", None)
    model._keys_to_ignore_on_save = names
    try:
        yield
    finally:
        if present:
            model._keys_to_ignore_on_save = before
        else:
            del model.__dict__["_keys_to_ignore_on_save"]


def is_learned(name: str) -> bool:
    """Whether a name in a state dict is that of scales or of weak columns."""
    return name.startswith("seal_scales.") or name.rpartition(".")[2] in (DELTA, INDEX)
