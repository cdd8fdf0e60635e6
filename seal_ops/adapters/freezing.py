"""The base model is frozen once, whatever is attached to it first, and thawed when the last of it is taken off; and a
warning where what is to learn is frozen, too."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

_RECORD = "_seal_frozen"


@dataclasses.dataclass
class Frozen:
    """``flags``: ``requires_grad`` of the base's parameters before, or None where PEFT has frozen them already.

    ``holders``: what is attached now.
    """

    flags: dict[str, bool] | None
    holders: list[str]


def has_peft_layers(model: nn.Module) -> bool:
    """Whether layers of PEFT's are in ``model``."""
    # By where its class is from: not all have a base in common (LLaMA-Adapter's has none).
    return any(type(m).__module__.startswith("peft.") for m in model.modules())


def freeze(owner: nn.Module, holder: str) -> None:
    """Freezes the parameters of ``owner`` for ``holder``; what another holder trains goes on training.

    Where PEFT's layers are in the model, PEFT has frozen the base and its flags are left alone.
    """
    record = owner.__dict__.get(_RECORD)
    if record is None:
        flags = None
        if not has_peft_layers(owner):
            flags = {name: p.requires_grad for name, p in owner.named_parameters()}
        record = owner.__dict__[_RECORD] = Frozen(flags, [])
    record.holders.append(holder)
    for name, p in owner.named_parameters():
        if name in (record.flags or ()):
            p.requires_grad_(False)


def thaw(owner: nn.Module, holder: str) -> None:
    """Takes ``holder`` off; with the last one the flags come back.  Parameters that came later keep theirs."""
    record = owner.__dict__[_RECORD]
    record.holders.remove(holder)
    if record.holders:
        return
    del owner.__dict__[_RECORD]
    if record.flags is None or has_peft_layers(owner):
        return
    for name, p in owner.named_parameters():
        if name in record.flags and (p.is_floating_point() or p.is_complex()):  # quantised since: never trained
            p.requires_grad_(record.flags[name])


def warn_if_frozen(module: nn.Module, parameter: nn.Parameter, meant: bool, what: str, handle: str) -> None:
    """Warns where a module is trained around a parameter that learns nothing, unless that is ``meant``.

    ``what`` says what the parameter is part of, ``handle`` what a user calls the object that freezes it.
    """
    if (
        module.training
        and not parameter.requires_grad
        and not meant
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        warnings.warn(
            f"seal_ops: the model is trained while its {what} are frozen; peft.get_peft_model freezes all that is not "
            f"its own. Call {handle}.requires_grad_(True) to train them too, or {handle}.requires_grad_(False) to say "
            f"that they are to stay",
            stacklevel=3,
        )


def attached_beside(owner: nn.Module, holder: str) -> bool:
    """Whether the base is frozen for something else than ``holder``, too."""
    record = owner.__dict__.get(_RECORD)
    return record is not None and any(name != holder for name in record.holders)


def forget_frozen(owner: nn.Module) -> None:
    """The base stays frozen for good; of a model whose parameters belong to another."""
    owner.__dict__.pop(_RECORD, None)
